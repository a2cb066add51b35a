"""DeepSeek-V4's attention: one key head that is also the value, seen through a window and compressed beyond it.

Shape legend: S sequence, B batch, H hidden, N heads, C channels of a head, A size of the compressed query, K keys (S
tokens, then the windows), G output groups, J channels of a group's heads, O output rank of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtp_convert.models.megatron.compressed_keys import (
    SPARSE_RATIO,
    Compressor,
    CompressorSubmodules,
    Indexer,
    Windows,
)
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, fresh
from mtp_convert.models.megatron.norms import unit_rms, widen
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.rope import (
    compressed_attention_angles,
    rotate_last,
    sequence_numbers,
    token_positions,
)
from mtp_convert.models.megatron.spec import build_module


class CompressedSparseAttention(MegatronModule):
    """Softmax over the last `csa_window_size` tokens, over the keys of windows of `ratio` tokens, and over a sink.

    The sink takes weight from the others and has no value. Ratio 0 has no windows; only ratio 4 has an indexer, without
    which all windows are seen.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CompressorSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        ratio: int,
    ) -> None:
        super().__init__(config, pg_collection)
        groups = self.pg_collection
        self.ratio = ratio
        self.attn_sink = nn.Parameter(torch.zeros(config.num_attention_heads, dtype=torch.float32))
        self.compressor = self.indexer = None
        if ratio:
            self.compressor = Compressor(config, submodules, groups, ratio=ratio, head_dim=config.v_head_dim)
        if ratio == SPARSE_RATIO:
            self.indexer = Indexer(config, submodules, groups, ratio=ratio)

    def forward(
        self,
        q_SBNC: Tensor,
        kv_SBC: Tensor,
        *,
        x_SBH: Tensor,
        q_SBA: Tensor,
        angles: Tensor,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """[S, B, N, C]. The keys of windows are made of the layer's input `x_SBH`, their choice also of `q_SBA`."""
        length, batch = x_SBH.shape[:2]
        positions = token_positions(length, packed_seq_params, x_SBH.device)
        numbers = sequence_numbers(length, packed_seq_params, x_SBH.device)
        keys_KBC, visible_SBK = kv_SBC, self._window(length, numbers, x_SBH.device)[:, None].expand(-1, batch, -1)
        if self.compressor is not None:
            windows = Windows.cut(positions, numbers, self.ratio)
            chosen_SBW = windows.visible_SW[:, None].expand(-1, batch, -1)
            if self.indexer is not None:
                chosen_SBW = self.indexer(x_SBH, q_SBA, angles, windows)
            keys_KBC = torch.cat((kv_SBC, self.compressor(x_SBH, windows)))
            visible_SBK = torch.cat((visible_SBK, chosen_SBW), -1)
        score_SBNK = widen(torch.einsum("sbnc,kbc->sbnk", q_SBNC, keys_KBC)) * self.config.v_head_dim**-0.5
        score_SBNK = score_SBNK.masked_fill(~visible_SBK[:, :, None], -math.inf)
        sink_SBN1 = self.attn_sink[:, None].expand(length, batch, -1, 1)
        weight_SBNK = torch.cat((score_SBNK, sink_SBN1), -1).softmax(-1)[..., :-1].to(keys_KBC.dtype)
        return torch.einsum("sbnk,kbc->sbnc", weight_SBNK, keys_KBC)

    def _window(self, length: int, numbers: Tensor | None, device: torch.device) -> Tensor:
        """Bool [S, S]: the last `csa_window_size` tokens of a token's own sequence, itself included."""
        near = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - self.config.csa_window_size)
        return near if numbers is None else near & (numbers[:, None] == numbers)


@dataclass(frozen=True)
class CompressedSelfAttentionSubmodules:
    """The modules inside compressed attention."""

    linear_q_down_proj: Any
    linear_q_up_proj: Any
    linear_kv_proj: Any
    core_attention: Any
    linear_proj: Any
    layernorm: Any


class CompressedSelfAttention(MegatronModule):
    """Compressed queries, heads at unit RMS, the last channels of queries and keys rotated, and the output's back.

    The output goes through one matrix per group of heads (`linear_o_group_proj`, the groups' rows behind one another)
    and then through `linear_proj`. ValueError for tensor ranks, over which Megatron does not cut it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CompressedSelfAttentionSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        compress_ratio: int,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, channels, rank = self.pg_collection, config.v_head_dim, config.q_lora_rank
        if groups.tp.size() > 1:
            raise ValueError(f"compressed attention is not cut over tensor ranks, got {groups.tp.size()} of them")
        size, inner = config.num_attention_heads * channels, config.o_groups * config.o_lora_rank

        def linear(spec: Any, inputs: int | None, outputs: int | None) -> Any:  # noqa: ANN401
            return build_module(spec, inputs, outputs, config=config, pg_collection=groups)

        self.compressed = compress_ratio > 0
        self.linear_o_group_proj = fresh(inner, size // config.o_groups, config=config)
        self.core_attention = build_module(
            submodules.core_attention, config, pg_collection=groups, ratio=compress_ratio
        )
        self.linear_proj = linear(submodules.linear_proj, inner, config.hidden_size)
        self.linear_q_down_proj = linear(submodules.linear_q_down_proj, config.hidden_size, rank)
        self.linear_q_up_proj = linear(submodules.linear_q_up_proj, rank, size)
        self.linear_kv_proj = linear(submodules.linear_kv_proj, config.hidden_size, channels)
        self.kv_layernorm = build_module(submodules.layernorm, config, channels, groups)
        self.q_layernorm = build_module(submodules.layernorm, config, rank, groups)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of hidden states [S, B, H]. It is causal and makes its own angles: mask and angles must be None."""
        given = {"attention_mask": attention_mask, "rotary_pos_emb": rotary_pos_emb}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"compressed attention takes no {', '.join(unused)}")
        config = self.config
        positions = token_positions(len(hidden_states), packed_seq_params, hidden_states.device)
        angles = compressed_attention_angles(positions, config, compressed=self.compressed)
        q_SBA = self.q_layernorm(self.linear_q_down_proj(hidden_states))
        q_SBNC = torch.unflatten(self.linear_q_up_proj(q_SBA), -1, (config.num_attention_heads, -1))
        q_SBNC = unit_rms(widen(q_SBNC), config.layernorm_epsilon).to(q_SBNC.dtype)
        kv_SBC = self.kv_layernorm(self.linear_kv_proj(hidden_states))
        mixed_SBNC = self.core_attention(
            rotate_last(q_SBNC, angles),
            rotate_last(kv_SBC[:, :, None], angles).squeeze(2),
            x_SBH=hidden_states,
            q_SBA=q_SBA,
            angles=angles,
            packed_seq_params=packed_seq_params,
        )
        # Values are rotated keys; turned back, what a token reads of another depends on their distance alone.
        grouped_SBGJ = torch.unflatten(rotate_last(mixed_SBNC, -angles).flatten(2), -1, (config.o_groups, -1))
        weight_GOJ = torch.unflatten(self.linear_o_group_proj, 0, (config.o_groups, -1))
        output: Tensor = self.linear_proj(torch.einsum("sbgj,goj->sbgo", grouped_SBGJ, weight_GOJ).flatten(2))
        return output
