"""One MTP layer: from a depth's hidden states and the next tokens to the next depth's hidden states.

Symbols: S sequence, B batch, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection, use_groups
from mtp_convert.models.megatron.hyper_connection import StreamHead
from mtp_convert.models.megatron.module import Metadata
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.placement import get_mtp_layer_offset
from mtp_convert.models.megatron.roll import roll_tensor
from mtp_convert.models.megatron.sharding import (
    Offset,
    ShardedStateDict,
    apply_prefix_mapping,
    make_sharded_tensors_for_checkpoint,
)
from mtp_convert.models.megatron.spec import build_module
from mtp_convert.models.megatron.transformer_layer import TransformerLayer

Embedding = Callable[..., Tensor]  # input_ids, position_ids [B, S] -> [S, B, H]


@dataclass
class MultiTokenPredictionLayerSubmodules:
    """The modules inside an MTP layer: norms of embedding and hidden states, projection, inner layer, final norm.

    With hyper-connections `e_proj` and `h_proj` take the place of the one projection.
    """

    enorm: Any = None
    hnorm: Any = None
    eh_proj: Any = None
    transformer_layer: Any = None
    layer_norm: Any = None
    e_proj: Any = None
    h_proj: Any = None


class MultiTokenPredictionLayer(StreamHead):
    """h' = final_layernorm(inner(eh_proj([enorm(embedding of the next token); hnorm(h)]))).

    With hyper-connections h and h' are streams, every one of them gets e_proj(enorm(embedding)) + h_proj(hnorm(h)), and
    `_postprocess` mixes and normalises them for the output layer alone.
    The inner layer, a TransformerLayer or a stack, goes by the name that `config.megatron_version` gives it.
    `layer_number` counts depths from 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int = 1,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, size = self.pg_collection, config.hidden_size
        self.submodules = submodules
        self.vp_stage = vp_stage
        with use_groups(groups):
            self.layer_number = layer_number + get_mtp_layer_offset(config, vp_stage)
        self.enorm = build_module(submodules.enorm, config, size, groups)
        self.hnorm = build_module(submodules.hnorm, config, size, groups)
        if config.enable_hyper_connections:
            self.add_head()
            self.e_proj = build_module(submodules.e_proj, size, size, config=config, pg_collection=groups)
            self.h_proj = build_module(submodules.h_proj, size, size, config=config, pg_collection=groups)
        else:
            self.eh_proj = build_module(submodules.eh_proj, 2 * size, size, config=config, pg_collection=groups)
        self.add_module(config.mtp_inner_name, build_module(submodules.transformer_layer, config, pg_collection=groups))
        self.final_layernorm = build_module(submodules.layer_norm, config, size, groups)

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Embedding,
        hidden_states: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and positions [B, S] one token further, their embeddings [S, B, H], and the hidden states."""
        cp = self.pg_collection.cp
        input_ids, _ = roll_tensor(input_ids, -1, -1, cp, packed_seq_params)
        position_ids, _ = roll_tensor(position_ids, -1, -1, cp, packed_seq_params)
        decoder_input = embedding(input_ids=input_ids, position_ids=position_ids)
        if self.config.mtp_detach_heads:
            decoder_input = decoder_input.detach()
        return input_ids, position_ids, decoder_input, hidden_states

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        """[S, B, H]: columns 0 to H - 1 of `eh_proj` meet the embedding, columns H to 2H - 1 the hidden states.

        Of streams [S, B, n * H], as many again.
        """
        if self.config.enable_hyper_connections:
            streams = torch.unflatten(hidden_states, -1, (self.config.num_residual_streams, -1))
            summed: Tensor = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(decoder_input))[:, :, None]
            return summed.flatten(2)
        fused: Tensor = self.eh_proj(torch.cat((self.enorm(decoder_input), self.hnorm(hidden_states)), -1))
        return fused

    def _proj_and_transformer_layer(
        self,
        hidden_states: Tensor,
        decoder_input: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: object | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
    ) -> Tensor:
        """The next depth's hidden states [S, B, H], or streams, from this one's and the next tokens' embeddings."""
        hidden_states = self._concat_embeddings(hidden_states, decoder_input)
        inner = getattr(self, self.config.mtp_inner_name)
        hidden_states = inner(
            hidden_states,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        streams: Tensor = hidden_states
        return streams if self.config.enable_hyper_connections else self._postprocess(hidden_states)

    def _postprocess(self, hidden_states: Tensor) -> Tensor:
        """The final norm [S, B, H], whose output the shared head reads, and the next depth if there are no streams."""
        mixed = self.contract(hidden_states) if self.config.enable_hyper_connections else hidden_states
        normed: Tensor = self.final_layernorm(mixed)
        return normed

    def _checkpointed_forward(self, forward_func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`forward_func` without keeping its activations, as `recompute_method` says.

        ValueError for another method than `uniform` (of one layer) and `block`, which keeps them in MTP layers.
        """
        config = self.config
        if config.recompute_method == "uniform" and config.recompute_num_layers == 1:
            output: Tensor = checkpoint(forward_func, *args, use_reentrant=False, **kwargs)
            return output
        if config.recompute_method == "block":
            warnings.warn("recompute_method='block' does nothing in MTP layers", stacklevel=2)
            return forward_func(*args, **kwargs)
        raise ValueError(
            "MTP layers are recomputed with recompute_method='uniform' and recompute_num_layers=1, "
            f"got {config.recompute_method!r} and {config.recompute_num_layers}"
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_params: object | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Tensor | None = None,
        embedding: Embedding | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one depth.

        `input_ids` and `position_ids` [B, S] and `hidden_states` [S, B, H] (or streams [S, B, n * H]) are the previous
        depth's; the same three come back for this depth, hidden states first. `rotary_pos_emb` [S, 1, 1, R] is the main
        model's; its tables for decoding with a cache (`rotary_pos_cos`, `rotary_pos_sin`, `sequence_len_offset`) are
        not read. ValueError for arguments that MTP layers cannot use: cross attention, biases of the scores, caches.
        """
        unused = {"context": context, "attention_bias": attention_bias, "inference_params": inference_params}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(f"MTP layers take no {', '.join(given)}")
        if embedding is None:
            raise ValueError("an MTP layer needs the model's embedding")
        input_ids, position_ids, decoder_input, hidden_states = self._get_embeddings(
            input_ids, position_ids, embedding, hidden_states, packed_seq_params
        )
        kept = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
        }
        run: Callable[..., Tensor] = self._proj_and_transformer_layer
        if self.config.recompute_granularity == "full" and self.training:
            hidden_states = self._checkpointed_forward(run, hidden_states, decoder_input, **kept)
        else:
            hidden_states = run(hidden_states, decoder_input, **kept)
        return hidden_states, input_ids, position_ids

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's. A TransformerLayer inside is stored as `transformer_layer`, whatever its name."""
        metadata = self.complete(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if isinstance(getattr(self, self.config.mtp_inner_name), TransformerLayer):
            apply_prefix_mapping(entries, {f"{prefix}{self.config.mtp_inner_name}.": f"{prefix}transformer_layer."})
        if self.config.megatron_version < (0, 17):
            entries |= self._core_attention_states(prefix, sharded_offsets, metadata)
        return entries

    def _core_attention_states(
        self, prefix: str, sharded_offsets: Sequence[Offset], metadata: Metadata
    ) -> ShardedStateDict:
        """Empty states of attention, which old versions store for MTP layers and no others."""
        states = {n: s for n, s in self.state_dict().items() if n.endswith("core_attention._extra_state")}
        groups = {"tp_group": self.pg_collection.tp, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(states, prefix, {}, sharded_offsets, **groups)
