"""The gated delta net: linear attention whose state forgets by a gate and is corrected towards new values.

Shape legend: S sequence, B batch, H hidden; N value heads of V channels; K key channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.factories import split_tensor_factory
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.mamba import by_sequence, causal_conv
from mtp_convert.models.megatron.module import MegatronModule, Metadata, fresh, share
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict
from mtp_convert.models.megatron.spec import build_module

_L2_EPSILON = 1e-6


@dataclass(frozen=True)
class GatedDeltaNetSubmodules:
    """The modules inside a gated delta net; `in_proj` normalises its input."""

    in_proj: Any
    out_norm: Any
    out_proj: Any


class Convolution(MegatronModule):
    """The weight of a causal convolution per channel, without bias."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(self, config: TransformerConfig, channels: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.weight = fresh(channels, 1, config.linear_conv_kernel_dim, config=config)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """See causal_conv."""
        return causal_conv(x_BSC, self.weight, None)


class GatedDeltaNet(MegatronModule):
    """in_proj to [query; key; value; z; beta; alpha], convolution over the first three, delta rule, norm, gate z."""

    tp_axes: ClassVar[Mapping[str, int]] = {"dt_bias": 0, "A_log": 0}

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, tp = self.pg_collection, self.pg_collection.tp.size()
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        self.heads = share(config.linear_num_value_heads, tp, "value heads")
        self.key_heads = share(config.linear_num_key_heads, tp, "key heads")
        self.d_key, self.d_value = keys // tp, values // tp
        self.dt_bias = nn.Parameter(torch.ones(self.heads, dtype=config.params_dtype))
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=config.params_dtype).uniform_(1, 16).log())
        linear: dict[str, Any] = {"config": config, "pg_collection": groups}
        rows = 2 * (keys + values + config.linear_num_value_heads)
        self.in_proj = build_module(submodules.in_proj, config.hidden_size, rows, **linear)
        self.conv1d = Convolution(config, 2 * self.d_key + self.d_value, groups)
        self.out_norm = build_module(submodules.out_norm, config, config.linear_value_head_dim, groups)
        self.out_proj = build_module(submodules.out_proj, values, config.hidden_size, **linear)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of [S, B, H]; it is causal by itself and needs neither mask nor positions."""
        projected = self.in_proj(hidden_states).transpose(0, 1)
        mixed = by_sequence(self._mix, projected, packed_seq_params)
        output: Tensor = self.out_proj(mixed.transpose(0, 1))
        return output

    def _mix(self, projected: Tensor) -> Tensor:
        """One sequence [B, S, N * V]."""
        sections = [2 * self.d_key + self.d_value, self.d_value, self.heads, self.heads]
        qkv, z, beta_BSN, alpha_BSN = torch.split(projected, sections, -1)
        q, k, v = torch.split(self.conv1d(qkv), [self.d_key, self.d_key, self.d_value], -1)
        repeat = self.heads // self.key_heads
        q_BSNK, k_BSNK = (
            _l2(torch.unflatten(x, -1, (self.key_heads, -1))).repeat_interleave(repeat, 2) for x in (q, k)
        )
        v_BSNV = torch.unflatten(v, -1, (self.heads, -1))
        decay_BSN = torch.exp(-widen(self.A_log).exp() * F.softplus(widen(alpha_BSN) + widen(self.dt_bias)))
        y_BSNV = _delta_rule(q_BSNK, k_BSNK, v_BSNV, decay_BSN, widen(beta_BSN).sigmoid())
        gated_BSNV: Tensor = self.out_norm(y_BSNV) * F.silu(torch.unflatten(widen(z), -1, (self.heads, -1)))
        return gated_BSNV.flatten(2).to(projected.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's, with the parts of in_proj and of the convolution stored apart."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        qkv = {"query": self.d_key, "key": self.d_key, "value": self.d_value}
        rest = {"z": self.d_value, "beta": self.heads, "alpha": self.heads}
        for name, parts in ((f"{prefix}in_proj.weight", qkv | rest), (f"{prefix}conv1d.weight", qkv)):
            entries[name] = split_tensor_factory(entries[name], list(parts.values()), list(parts))
        return entries


def _l2(x: Tensor) -> Tensor:
    """Scaled to length 1 along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPSILON)


def _delta_rule(q_BSNK: Tensor, k_BSNK: Tensor, v_BSNV: Tensor, decay_BSN: Tensor, beta_BSN: Tensor) -> Tensor:
    """[B, S, N, V]: the state decays, moves by `beta` from what it holds for k towards v, and is read with q."""
    q_BSNK = q_BSNK * q_BSNK.shape[-1] ** -0.5
    state_BNKV = q_BSNK.new_zeros(*q_BSNK[:, 0].shape, v_BSNV.shape[-1])
    steps = []
    for t in range(q_BSNK.shape[1]):
        key_BNK1 = k_BSNK[:, t, :, :, None]
        state_BNKV = state_BNKV * decay_BSN[:, t, :, None, None]
        held_BNV = (state_BNKV * key_BNK1).sum(-2)
        change_BNV = (v_BSNV[:, t] - held_BNV) * beta_BSN[:, t, :, None]
        state_BNKV = state_BNKV + key_BNK1 * change_BNV[..., None, :]
        steps.append((state_BNKV * q_BSNK[:, t, :, :, None]).sum(-2))
    return torch.stack(steps, 1)
