"""Self-attention over query groups.

Shape legend: S sequence, B batch, H hidden, N query heads, G query groups, Q = N / G, C channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import EmptyState, MegatronModule, Metadata, share
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.rope import rotate, sequence_numbers
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict
from mtp_convert.models.megatron.spec import build_module


class CoreAttention(MegatronModule):
    """Softmax attention without weights: causal, and within each packed sequence."""

    def forward(
        self,
        q_SBNC: Tensor,
        k_SBGC: Tensor,
        v_SBGV: Tensor,
        *,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        scale: float,
        before: int | None = None,
    ) -> Tensor:
        """[S, B, N * V]. `attention_mask` (bool, [1 or B, 1, S, S]) is True where a query must not look, besides.

        `before`: how many tokens before it a query sees, None for all.
        """
        visible = visible_keys(len(q_SBNC), attention_mask, packed_seq_params, q_SBNC.device, before=before)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNC, k_SBGC, v_SBGV))
        mixed_BNSV = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
        )
        return mixed_BNSV.permute(2, 0, 1, 3).flatten(2)


class TECoreAttention(EmptyState, CoreAttention):
    """A CoreAttention whose empty state is in the module's state dict, but not in sharded checkpoints."""

    def own_entries(self, prefix: str, sharded_offsets: Sequence[Offset], metadata: Metadata) -> ShardedStateDict:
        """None."""
        return {}


def visible_keys(
    length: int,
    mask: Tensor | None,
    packed: PackedSeqParams | None,
    device: torch.device,
    *,
    before: int | None = None,
) -> Tensor | None:
    """Which keys a query sees, bool [..., S, S]; None if that is all that are not behind it. See CoreAttention."""
    numbers = sequence_numbers(length, packed, device)
    if mask is None and numbers is None and before is None:
        return None
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if before is not None:
        visible = visible.triu(-before)
    if numbers is not None:
        visible = visible & (numbers[:, None] == numbers)
    return visible if mask is None else visible & ~mask


@dataclass(frozen=True)
class SelfAttentionSubmodules:
    """The modules inside attention."""

    linear_qkv: Any
    core_attention: Any
    linear_proj: Any
    qk_layernorm: Any = None


class SelfAttention(MegatronModule):
    """Attention whose `linear_qkv` holds, group by group, the rows of q..q, (gates..,) k, v.

    `window`: it sees the config's window alone. `rotary`: it turns queries and keys, if positions are rotary.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        window: bool = False,
        rotary: bool = True,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, tp = self.pg_collection, self.pg_collection.tp.size()
        self.before = config.window_size[0] if window and config.window_size and config.window_size[0] >= 0 else None
        self.rotary = rotary
        self.query_groups = share(config.num_query_groups, tp, "query groups")
        self.per_group = config.num_attention_heads // config.num_query_groups
        size = config.kv_channels * config.num_attention_heads
        rows = size * (2 if config.attention_output_gate else 1) + 2 * config.kv_channels * config.num_query_groups
        self.core_attention = build_module(submodules.core_attention, config, pg_collection=groups)
        self.linear_proj = build_module(
            submodules.linear_proj,
            size,
            config.hidden_size,
            config=config,
            bias=config.add_bias_linear,
            pg_collection=groups,
        )
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            rows,
            config=config,
            bias=config.add_bias_linear or config.add_qkv_bias,
            pg_collection=groups,
        )
        if config.qk_layernorm:
            self.q_layernorm = build_module(submodules.qk_layernorm, config, config.kv_channels, groups)
            self.k_layernorm = build_module(submodules.qk_layernorm, config, config.kv_channels, groups)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of hidden states [S, B, H] and angles [S, 1, 1, R], if positions are rotary."""
        channels = self.config.kv_channels
        mixed = torch.unflatten(self.linear_qkv(hidden_states), -1, (self.query_groups, -1, channels))
        heads_SBGxC, k_SBGC, v_SBGC = mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]
        q_SBNC = heads_SBGxC[..., : self.per_group, :].flatten(2, 3)
        if self.config.qk_layernorm:
            q_SBNC, k_SBGC = self.q_layernorm(q_SBNC), self.k_layernorm(k_SBGC)
        if rotary_pos_emb is not None and self.rotary:
            pairs = self.config.rotary_interleaved
            q_SBNC, k_SBGC = (rotate(x, rotary_pos_emb, interleaved=pairs) for x in (q_SBNC, k_SBGC))
        mixed_SBx = self.core_attention(
            q_SBNC,
            k_SBGC,
            v_SBGC,
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
            scale=channels**-0.5,
            before=self.before,
        )
        if self.config.attention_output_gate:
            gate = heads_SBGxC[..., self.per_group :, :].flatten(2)
            mixed_SBx = (mixed_SBx * widen(gate).sigmoid()).to(mixed_SBx.dtype)
        output: Tensor = self.linear_proj(mixed_SBx)
        return output
