"""Latent attention to the keys that an indexer chooses, of DeepSeek-V3.2 and GLM-5.

Shape legend: S sequence (queries), T the same (keys), B batch, H hidden, A size of the compressed query, X indexer
heads, Y channels of them, K chosen keys.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_convert.models.megatron.attention import CoreAttention, visible_keys
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.mla import MLASelfAttention
from mtp_convert.models.megatron.module import MegatronModule
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.rope import latent_attention_angles, rotate, token_positions
from mtp_convert.models.megatron.spec import build_module


@dataclass(frozen=True)
class DSAIndexerSubmodules:
    """The modules inside an indexer."""

    linear: Any
    layernorm: Any


class DSAIndexer(MegatronModule):
    """Scores of all keys by small heads of its own, whose weights depend on the query.

    Megatron may also turn queries and keys by one orthogonal matrix, for the sake of low precision. No score depends on
    it, and it is left out.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DSAIndexerSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, heads, size = self.pg_collection, config.dsa_indexer_n_heads, config.dsa_indexer_head_dim

        def linear(inputs: int | None, outputs: int) -> Any:  # noqa: ANN401
            return build_module(submodules.linear, inputs, outputs, config=config, pg_collection=groups)

        epsilon = config.dsa_indexer_k_norm_epsilon
        norm = replace(
            config,
            normalization="LayerNorm",
            layernorm_epsilon=config.layernorm_epsilon if epsilon is None else epsilon,
        )
        self.linear_wq_b = linear(config.q_lora_rank, heads * size)
        self.linear_wk = linear(config.hidden_size, size)
        self.k_norm = build_module(submodules.layernorm, norm, size, groups)
        self.linear_weights_proj = linear(config.hidden_size, heads)

    def forward(
        self, x_SBH: Tensor, q_SBA: Tensor, visible: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """Numbers of the chosen keys [B, S, K] for the layer's input and its compressed queries.

        `visible`: bool [S, T] or [B, S, T]. Queries that see fewer than K keys get others besides, which stay unseen.
        """
        config = self.config
        positions = token_positions(len(x_SBH), packed_seq_params, x_SBH.device)
        angles, factor = latent_attention_angles(positions, config)

        def turned(x_SBXY: Tensor) -> Tensor:
            return rotate(x_SBXY, angles, reorder=config.dsa_indexer_rope_interleaved, factor=factor)

        q_SBXY = turned(torch.unflatten(self.linear_wq_b(q_SBA), -1, (config.dsa_indexer_n_heads, -1)))
        k_TBY = turned(self.k_norm(self.linear_wk(x_SBH))[:, :, None]).squeeze(2)
        weight_SBX = self.linear_weights_proj(x_SBH) * (q_SBXY.shape[-2] * q_SBXY.shape[-1]) ** -0.5
        score_BSXT = torch.einsum("sbxy,tby->bsxt", widen(q_SBXY), widen(k_TBY))
        if config.dsa_indexer_scoring_relu:
            score_BSXT = F.relu(score_BSXT)
        score_BST = torch.einsum("bsxt,sbx->bst", score_BSXT, widen(weight_SBX)).masked_fill(~visible, -math.inf)
        return score_BST.topk(min(config.dsa_indexer_topk, len(x_SBH))).indices


@dataclass(frozen=True)
class DSAttentionSubmodules:
    """The module inside sparse attention."""

    indexer: Any


class DSAttention(CoreAttention):
    """Softmax attention over chosen keys.

    layer, source: numbers of this layer and of the one whose indexer chooses for it; only where both are the same it
    has one. choices: what indexers of one forward pass chose, by layer; the layers of a stage share it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DSAttentionSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layer: int,
        source: int,
        choices: MutableMapping[int, Tensor],
    ) -> None:
        super().__init__(config, pg_collection)
        self.source, self.choices = source, choices
        self.indexer = None
        if layer == source:
            self.indexer = build_module(submodules.indexer, config, pg_collection=self.pg_collection)

    def hide(
        self,
        x_SBH: Tensor,
        q_SBA: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """`attention_mask` and what was not chosen, bool [B, 1, S, T]; ValueError if the source layer has not run."""
        if self.indexer is not None:
            length = len(x_SBH)
            visible = visible_keys(length, attention_mask, packed_seq_params, x_SBH.device)
            if visible is None:
                visible = torch.ones(length, length, dtype=torch.bool, device=x_SBH.device).tril()
            visible = visible.squeeze(1) if visible.dim() > 2 else visible
            self.choices[self.source] = self.indexer(x_SBH, q_SBA, visible, packed_seq_params)
        if self.source not in self.choices:
            raise ValueError(f"layer {self.source}, whose indexer chooses, must run before, on the same stage")
        chosen_BSK = self.choices[self.source]
        every = torch.ones(*chosen_BSK.shape[:2], len(x_SBH), dtype=torch.bool, device=x_SBH.device)
        hidden = every.scatter(2, chosen_BSK, False)[:, None]
        return hidden if attention_mask is None else hidden | attention_mask


class SparseMLASelfAttention(MLASelfAttention):
    """Latent attention around DSAttention."""

    core_attention: DSAttention

    def _mask(
        self,
        hidden_states: Tensor,
        compressed: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor | None:
        return self.core_attention.hide(hidden_states, compressed, attention_mask, packed_seq_params)
