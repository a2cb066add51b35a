"""The Mamba2 mixer.

Shape legend: S sequence, B batch, H hidden; N heads of P channels, I = N * P inner channels; U groups that share the
state's input and output (R values each), W convolution kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.factories import apply_mamba_sharded_factories
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, Metadata, fresh, share
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict
from mtp_convert.models.megatron.spec import build_module

_CONV_KERNEL = 4  # Megatron builds every mixer with this
_NORM_EPSILON = 1e-5  # and its inner norm with this, whatever layernorm_epsilon says


def by_sequence(mix: Callable[[Tensor], Tensor], x_BSC: Tensor, packed: PackedSeqParams | None) -> Tensor:
    """`mix` [B, S, C] -> [B, S, D] applied to every packed sequence by itself, or to the row if it is one sequence."""
    if packed is None or packed.boundaries is None:
        return mix(x_BSC)
    ends = [0, *packed.boundaries.tolist(), x_BSC.shape[1]]
    lengths = [b - a for a, b in pairwise(ends) if b > a]
    return torch.cat([mix(part) for part in torch.split(x_BSC, lengths, 1)], 1)


def causal_conv(x_BSC: Tensor, w_C1W: Tensor, bias_C: Tensor | None) -> Tensor:
    """A convolution along S per channel that sees nothing behind, then SiLU; float32 at least."""
    padded_BSC = F.pad(widen(x_BSC), (0, 0, w_C1W.shape[-1] - 1, 0))
    # Products summed by hand: on a GPU a float32 convolution may be rounded to TF32 inside.
    mixed_BSC = (padded_BSC.unfold(1, w_C1W.shape[-1], 1) * widen(w_C1W[:, 0])).sum(-1)
    return F.silu(mixed_BSC if bias_C is None else mixed_BSC + widen(bias_C))


@dataclass(frozen=True)
class MambaMixerSubmodules:
    """The modules inside a mixer; `in_proj` normalises its input."""

    in_proj: Any
    out_proj: Any


class GatedNorm(MegatronModule):
    """RMSNorm over each of several equal parts of the last axis."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(self, config: TransformerConfig, size: int, parts: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.parts = parts
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., size] normalised."""
        wide = torch.unflatten(widen(x), -1, (self.parts, -1))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _NORM_EPSILON)
        return (normed.flatten(-2) * widen(self.weight)).to(x.dtype)


class MambaMixer(MegatronModule):
    """in_proj to [z; x; B; C; dt], causal convolution over [x; B; C], scan, gate and norm, out_proj."""

    tp_axes: ClassVar[Mapping[str, int]] = dict.fromkeys(("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D"), 0)

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, tp = self.pg_collection, self.pg_collection.tp.size()
        inner, heads = config.mamba_num_heads * config.mamba_head_dim, config.mamba_num_heads
        shared = config.mamba_num_groups * config.mamba_state_dim
        self.nheads, self.ngroups = share(heads, tp, "Mamba heads"), share(config.mamba_num_groups, tp, "Mamba groups")
        self.d_inner, self.d_bc = inner // tp, shared // tp
        wide = torch.promote_types(config.params_dtype, torch.float32)
        channels = self.d_inner + 2 * self.d_bc
        self.conv1d_weight = fresh(channels, 1, _CONV_KERNEL, config=config)
        self.conv1d_bias = nn.Parameter(torch.zeros(channels, dtype=config.params_dtype))
        self.dt_bias = nn.Parameter(_fresh_dt_bias(self.nheads).to(config.params_dtype))
        self.A_log = nn.Parameter(torch.empty(self.nheads, dtype=wide).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads, dtype=wide))
        linear: dict[str, Any] = {"config": config, "pg_collection": groups}
        self.in_proj = build_module(submodules.in_proj, config.hidden_size, 2 * (inner + shared) + heads, **linear)
        self.norm = GatedNorm(config, self.d_inner, self.ngroups, groups)
        self.out_proj = build_module(submodules.out_proj, inner, config.hidden_size, **linear)

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """[S, B, H] of [S, B, H]."""
        projected = self.in_proj(hidden_states).transpose(0, 1)
        mixed_BSI = by_sequence(self._mix, projected, packed_seq_params)
        output: Tensor = self.out_proj(self.norm(mixed_BSI.transpose(0, 1)))
        return output

    def _mix(self, zxBCdt: Tensor) -> Tensor:
        """Convolution, scan and gate of one sequence [B, S, I]."""
        z_BSI, mixed, dt_BSN = torch.split(zxBCdt, [self.d_inner, self.d_inner + 2 * self.d_bc, self.nheads], -1)
        mixed = causal_conv(mixed, self.conv1d_weight, self.conv1d_bias)
        x_BSI, b_BSc, c_BSc = torch.split(mixed, [self.d_inner, self.d_bc, self.d_bc], -1)
        x_BSNP = torch.unflatten(x_BSI, -1, (self.nheads, -1))
        b_BSNR, c_BSNR = (
            torch.unflatten(u, -1, (self.ngroups, -1)).repeat_interleave(self.nheads // self.ngroups, 2)
            for u in (b_BSc, c_BSc)
        )
        dt_BSN = F.softplus(widen(dt_BSN) + widen(self.dt_bias))
        y_BSNP = _scan(x_BSNP, dt_BSN, -self.A_log.exp(), b_BSNR=b_BSNR, c_BSNR=c_BSNR)
        y_BSNP = y_BSNP + x_BSNP * self.D[:, None]
        return (y_BSNP.flatten(2) * F.silu(widen(z_BSI))).to(zxBCdt.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's, with the parts of in_proj and of the convolution stored apart."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_mamba_sharded_factories(entries, prefix, d_inner=self.d_inner, d_bc=self.d_bc, nheads=self.nheads)
        return entries


def _fresh_dt_bias(heads: int) -> Tensor:
    """So that softplus of it lies between 0.001 and 0.1, evenly on a logarithmic scale."""
    steps = torch.exp(torch.rand(heads) * math.log(0.1 / 0.001) + math.log(0.001))
    return steps + torch.log(-torch.expm1(-steps))


def _scan(x_BSNP: Tensor, dt_BSN: Tensor, a_N: Tensor, *, b_BSNR: Tensor, c_BSNR: Tensor) -> Tensor:
    """Mamba2's recurrence [B, S, N, P]: state = exp(dt * a) * state + outer(dt * x, b); y = state @ c."""
    decay_BSN = torch.exp(dt_BSN * a_N)
    inflow_BSNP = dt_BSN[..., None] * x_BSNP
    state_BNPR = x_BSNP.new_zeros(*inflow_BSNP[:, 0].shape, b_BSNR.shape[-1])
    steps = []
    for t in range(x_BSNP.shape[1]):
        inflow_BNPR = inflow_BSNP[:, t, :, :, None] * b_BSNR[:, t, :, None, :]
        state_BNPR = decay_BSN[:, t, :, None, None] * state_BNPR + inflow_BNPR
        steps.append((state_BNPR * c_BSNR[:, t, :, None, :]).sum(-1))
    return torch.stack(steps, 1)
