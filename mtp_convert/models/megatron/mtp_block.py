"""All MTP layers of a model, one depth after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtp_convert.models.megatron.backends import BackendSpecProvider, LocalSpecProvider, TESpecProvider
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection, use_groups
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.mtp_layer import (
    Embedding,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.placement import get_mtp_layer_offset
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict, replace_prefix_for_sharding
from mtp_convert.models.megatron.spec import ModuleSpec, build_module


def get_mtp_layer_spec(transformer_layer_spec: ModuleSpec, use_transformer_engine: bool) -> ModuleSpec:
    """An MTP layer around `transformer_layer_spec`, with TransformerEngine's modules or Megatron's own."""
    backend = TESpecProvider() if use_transformer_engine else LocalSpecProvider()
    return get_mtp_layer_spec_for_backend(transformer_layer_spec, backend)


def get_mtp_layer_spec_for_backend(transformer_layer_spec: ModuleSpec, backend: BackendSpecProvider) -> ModuleSpec:
    """An MTP layer around `transformer_layer_spec`, with a backend's modules."""
    norm = backend.layer_norm()
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        eh_proj=backend.column_parallel_linear(),
        transformer_layer=transformer_layer_spec,
        layer_norm=norm,
        e_proj=backend.column_parallel_linear(),
        h_proj=backend.column_parallel_linear(),
    )
    return ModuleSpec(MultiTokenPredictionLayer, submodules=submodules)


@dataclass
class MultiTokenPredictionBlockSubmodules:
    """The MTP layers, each described whole; one for all depths if they repeat it."""

    layer_specs: Sequence[ModuleSpec] | None = None


def _get_mtp_block_submodules(
    config: TransformerConfig, spec: MultiTokenPredictionBlockSubmodules | ModuleSpec
) -> MultiTokenPredictionBlockSubmodules:
    """The layers that `spec` describes; TypeError if it describes something else than an MTP block."""
    if isinstance(spec, ModuleSpec) and isinstance(spec.module, type):
        if issubclass(spec.module, MultiTokenPredictionBlock):
            submodules: MultiTokenPredictionBlockSubmodules = spec.submodules
            return submodules
        raise TypeError(f"expected the description of an MTP block, got one of {spec.module.__name__}")
    if not isinstance(spec, MultiTokenPredictionBlockSubmodules):
        raise TypeError(f"expected the description of an MTP block, got {type(spec).__name__}")
    return spec


class MultiTokenPredictionBlock(MegatronModule):
    """Runs `config.mtp_num_layers` depths, each by its own layer or all by the one that they share.

    ValueError if there is not a layer for every depth.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: MultiTokenPredictionBlockSubmodules | ModuleSpec,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.submodules = _get_mtp_block_submodules(config, spec)
        self.vp_stage = vp_stage
        self.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor
        self._build_layers(self.pg_collection)

    def _build_layers(self, pg_collection: ProcessGroupCollection) -> None:
        specs = list(self.submodules.layer_specs or ())
        if self.config.mtp_use_repeated_layer:
            specs = specs[:1]
        if not specs or len(specs) != self.config.mtp_stored_layers:
            raise ValueError(f"{len(specs)} MTP layers described, the model has {self.config.mtp_stored_layers}")
        self.layers = nn.ModuleList(
            build_module(layer, self.config, layer_number=i + 1, vp_stage=self.vp_stage, pg_collection=pg_collection)
            for i, layer in enumerate(specs)
        )

    @property
    def _offset(self) -> int:
        """MTP layers on earlier stages."""
        with use_groups(self.pg_collection):
            return get_mtp_layer_offset(self.config, self.vp_stage)

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
        extra_block_kwargs: Mapping[str, Any] | None = None,
        embedding: Embedding | None = None,
        mhc_multistream: Tensor | None = None,
    ) -> Tensor:
        """[(1 + D) * S, B, H]: the hidden states [S, B, H] that came in and those of every depth, one after another.

        See MultiTokenPredictionLayer for the arguments; `extra_block_kwargs` are more of them. `mhc_multistream`
        [S, B, n * H] are the streams behind `hidden_states`, from which the depths go on if there are any.
        """
        parts = list(hidden_states.chunk(1 + self._offset))
        hidden = parts[-1] if mhc_multistream is None else mhc_multistream
        hidden = hidden.detach() if self.config.mtp_detach_heads else hidden
        for depth in range(self.config.mtp_num_layers or 0):
            layer = self.layers[0 if self.config.mtp_use_repeated_layer else depth]
            assert isinstance(layer, MultiTokenPredictionLayer)
            hidden, input_ids, position_ids = layer(
                input_ids,
                position_ids,
                hidden,
                attention_mask,
                context=context,
                context_mask=context_mask,
                rotary_pos_emb=rotary_pos_emb,
                rotary_pos_cos=rotary_pos_cos,
                rotary_pos_sin=rotary_pos_sin,
                attention_bias=attention_bias,
                inference_params=inference_params,
                packed_seq_params=packed_seq_params,
                sequence_len_offset=sequence_len_offset,
                embedding=embedding,
                **(extra_block_kwargs or {}),
            )
            parts.append(hidden if mhc_multistream is None else layer._postprocess(hidden))
        return torch.cat(parts)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """Layers one by one, by depth, never stacked."""
        entries: ShardedStateDict = {}
        for local, layer in enumerate(self.layers):
            assert isinstance(layer, MultiTokenPredictionLayer)
            name = f"{prefix}layers.{local}."
            own = layer.sharded_state_dict(name, (), metadata)
            replace_prefix_for_sharding(own, name, f"{prefix}layers.{layer.layer_number - 1}.")
            entries |= own
        return entries
