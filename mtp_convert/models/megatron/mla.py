"""Multi-head latent attention: queries, keys and values from compressed hidden states.

Shape legend: S sequence, B batch, H hidden, N heads; per head P plain and R rotated query channels, V value channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, share
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.rope import latent_attention_angles, rotate, token_positions, yarn_mscale
from mtp_convert.models.megatron.spec import build_module


@dataclass(frozen=True)
class MLASelfAttentionSubmodules:
    """The modules inside latent attention; the up projections hold the norms unless `layernorm` is given."""

    linear_q_proj: Any
    linear_down_proj: Any
    linear_up_proj: Any
    core_attention: Any
    linear_proj: Any
    layernorm: Any = None


class MLASelfAttention(MegatronModule):
    """Latent attention. Rows per head: [plain, rotated] in the query's up projection, [plain key, value] in the other.

    `linear_kv_down_proj` gives the compressed keys and values and, behind them, one rotated key for all heads. Without
    `q_lora_rank` queries are not compressed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, heads = self.pg_collection, config.num_attention_heads
        self.heads = share(heads, groups.tp.size(), "attention heads")
        compressed = config.kv_lora_rank + config.qk_pos_emb_head_dim
        queries = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        keys_values = heads * (config.qk_head_dim + config.v_head_dim)

        def linear(spec: Any, inputs: int, outputs: int, *, bias: bool = False) -> Any:  # noqa: ANN401
            return build_module(spec, inputs, outputs, config=config, bias=bias, pg_collection=groups)

        self.core_attention = build_module(submodules.core_attention, config, pg_collection=groups)
        values = heads * config.v_head_dim
        self.linear_proj = linear(submodules.linear_proj, values, config.hidden_size, bias=config.add_bias_linear)
        if config.q_lora_rank is None:
            self.linear_q_proj = linear(submodules.linear_q_proj, config.hidden_size, queries)
        else:
            self.linear_q_down_proj = linear(submodules.linear_down_proj, config.hidden_size, config.q_lora_rank)
            self.linear_q_up_proj = linear(submodules.linear_up_proj, config.q_lora_rank, queries)
        self.linear_kv_down_proj = linear(submodules.linear_down_proj, config.hidden_size, compressed)
        self.linear_kv_up_proj = linear(submodules.linear_up_proj, config.kv_lora_rank, keys_values)
        self.has_norms = submodules.layernorm is not None and config.qk_layernorm
        if self.has_norms:
            if config.q_lora_rank is not None:
                self.q_layernorm = build_module(submodules.layernorm, config, config.q_lora_rank, groups)
            self.kv_layernorm = build_module(submodules.layernorm, config, config.kv_lora_rank, groups)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of hidden states [S, B, H]; it makes its own angles, so `rotary_pos_emb` must be None."""
        if rotary_pos_emb is not None:
            raise ValueError("latent attention makes its own rotary angles, got some from outside")
        config = self.config
        positions = token_positions(len(hidden_states), packed_seq_params, hidden_states.device)
        angles, factor = latent_attention_angles(positions, config)
        compressed_q = self._compressed_queries(hidden_states)
        q_SBNx = torch.unflatten(self._queries(compressed_q), -1, (self.heads, -1))
        q_SBNP, q_SBNR = torch.split(q_SBNx, [config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
        compressed, k_SBR = torch.split(
            self.linear_kv_down_proj(hidden_states), [config.kv_lora_rank, config.qk_pos_emb_head_dim], -1
        )
        compressed = self.kv_layernorm(compressed) if self.has_norms else compressed
        kv_SBNx = torch.unflatten(self.linear_kv_up_proj(compressed), -1, (self.heads, -1))
        k_SBNP, v_SBNV = torch.split(kv_SBNx, [config.qk_head_dim, config.v_head_dim], -1)
        q_SBNR = rotate(q_SBNR, angles, reorder=True, factor=factor)
        k_SBNR = rotate(k_SBR[:, :, None], angles, reorder=True, factor=factor).expand_as(q_SBNR)
        mixed_SBx = self.core_attention(
            torch.cat((q_SBNP, q_SBNR), -1),
            torch.cat((k_SBNP, k_SBNR), -1),
            v_SBNV,
            attention_mask=self._mask(hidden_states, compressed_q, attention_mask, packed_seq_params),
            packed_seq_params=packed_seq_params,
            scale=self._scale(),
        )
        output: Tensor = self.linear_proj(mixed_SBx)
        return output

    def _compressed_queries(self, hidden_states: Tensor) -> Tensor:
        """What queries are made of, [S, B, q_lora_rank]; [S, B, H] if they are not compressed."""
        if self.config.q_lora_rank is None:
            return hidden_states
        compressed: Tensor = self.linear_q_down_proj(hidden_states)
        return self.q_layernorm(compressed) if self.has_norms else compressed

    def _queries(self, compressed: Tensor) -> Tensor:
        """[S, B, N * (P + R)]."""
        queries: Tensor = (self.linear_q_proj if self.config.q_lora_rank is None else self.linear_q_up_proj)(compressed)
        return queries

    def _mask(
        self,
        hidden_states: Tensor,
        compressed: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor | None:
        """Where a query must not look: here, what is asked for."""
        return attention_mask

    def _scale(self) -> float:
        """Factor of the scores before the softmax."""
        correction = yarn_mscale(self.config.rotary_scaling_factor, self.config.mscale_all_dim)
        return correction * correction / math.sqrt(self.config.qk_head_dim + self.config.qk_pos_emb_head_dim)
