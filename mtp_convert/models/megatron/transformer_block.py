"""Stacks of layers: the decoder of a GPT model, the decoder and the inner layers of a hybrid model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.hyper_connection import StreamHead, expand
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict, replace_prefix_for_sharding
from mtp_convert.models.megatron.spec import ModuleSpec, build_module


@dataclass(frozen=True)
class TransformerBlockSubmodules:
    """The layers of one stage, and the final norm."""

    layer_specs: Sequence[ModuleSpec]
    layer_norm: Any = None


class LayerStack(StreamHead):
    """Layers in order, then a final norm if `norm_name` says under which name there is one.

    With hyper-connections the first stage makes streams of its input, and the final norm follows a mix of them.
    `layer_offset` is the number of the model's layers on earlier stages. The first stage gets its input by call, later
    ones by `set_input_tensor`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        layer_offset: int = 0,
        norm_name: str | None = None,
        pre_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.pre_process = pre_process
        self.norm_name = norm_name
        self.input_tensor: Tensor | None = None
        self.layers = nn.ModuleList(
            build_module(layer, config, layer_number=layer_offset + i + 1, pg_collection=self.pg_collection)
            for i, layer in enumerate(spec.layer_specs)
        )
        if norm_name is not None:
            self.add_module(norm_name, build_module(spec.layer_norm, config, config.hidden_size, self.pg_collection))
            if config.enable_hyper_connections:
                self.add_head()

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Give a later stage the hidden states [S, B, H] of the stage before it."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """`finish` of `run_layers`."""
        return self.finish(self.run_layers(hidden_states, attention_mask, rotary_pos_emb, packed_seq_params, input_ids))

    def run_layers(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """The last layer's output [S, B, H], or [S, B, n * H] of n streams.

        `hidden_states` [S, B, H] count on the first stage alone. See TransformerLayer for the other arguments.
        ValueError without input.
        """
        x = hidden_states if self.pre_process else self.input_tensor
        if x is None:
            raise ValueError("no input: the first stage takes hidden states, the others set_input_tensor before a call")
        if self.pre_process and self.config.enable_hyper_connections:
            x = expand(x, self.config)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                input_ids=input_ids,
            )
        assert isinstance(x, Tensor)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The stage's output: behind the last layer the final norm [S, B, H], else what the layers gave."""
        if self.norm_name is None:
            return x
        normed: Tensor = getattr(self, self.norm_name)(self.contract(x) if self.config.enable_hyper_connections else x)
        return normed

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """Layers by the model's number: in their key, or as an axis in front of their tensors if they are stacked."""
        metadata = self.complete(metadata)
        stacked = self._stacked(metadata)
        entries = self.own_entries(prefix, sharded_offsets, metadata)
        for local, layer in enumerate(self.layers):
            assert isinstance(layer, MegatronModule)
            index = int(layer.layer_number) - 1  # type: ignore[arg-type]
            name = f"{prefix}layers.{local}."
            offsets = ((0, index, self.config.num_layers),) if stacked else ()
            own = layer.sharded_state_dict(name, offsets, metadata)
            replace_prefix_for_sharding(own, name, f"{prefix}layers." if stacked else f"{prefix}layers.{index}.")
            entries |= own
        if self.norm_name is not None:
            norm = getattr(self, self.norm_name)
            entries |= norm.sharded_state_dict(f"{prefix}{self.norm_name}.", sharded_offsets, metadata)
        return entries

    def _stacked(self, metadata: Metadata) -> bool:
        return False


class TransformerBlock(LayerStack):
    """The decoder of a GPT model, whose equal layers are stored as one tensor each."""

    def _stacked(self, metadata: Metadata) -> bool:
        one_by_one = metadata.get("non_homogeneous_layers", False) or metadata.get("singleton_local_shards", False)
        return self.config.homogeneous and not one_by_one


class HybridStack(LayerStack):
    """Layers of different kinds, stored one by one."""


def decoder_layers(config: TransformerConfig, vp_stage: int | None = None, pp_rank: int = 0) -> range:
    """Numbers, from 0, of the decoder layers on a stage; ValueError if the layers do not divide among the stages."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        first = layout.get_layer_offset(vp_stage=vp_stage, pp_rank=pp_rank)
        return range(first, first + layout.get_num_layers_to_build(vp_stage=vp_stage, pp_rank=pp_rank))
    virtual = config.virtual_pipeline_model_parallel_size or 1
    if virtual > 1 and (vp_stage is None or not 0 <= vp_stage < virtual):
        raise ValueError(f"vp_stage must be 0 to {virtual - 1}, got {vp_stage}")
    per_stage = [_divided(layers, virtual, "virtual stages") for layers in _layers_per_rank(config)]
    first = (vp_stage or 0) * sum(per_stage) + sum(per_stage[:pp_rank])
    return range(first, first + per_stage[pp_rank])


def _layers_per_rank(config: TransformerConfig) -> list[int]:
    """Decoder layers of every pipeline rank: as given for the first and last, even for the others."""
    ranks: list[int | None] = [None] * config.pipeline_model_parallel_size
    for rank, given in (
        (0, config.num_layers_in_first_pipeline_stage),
        (-1, config.num_layers_in_last_pipeline_stage),
    ):
        if given is not None:
            ranks[rank] = given
    rest, open_ranks = config.num_layers - sum(given or 0 for given in ranks), ranks.count(None)
    even = _divided(rest, open_ranks, "pipeline ranks") if open_ranks else 0
    counts = [even if given is None else given for given in ranks]
    if sum(counts) != config.num_layers:
        raise ValueError(f"pipeline ranks hold {counts} layers, the model has {config.num_layers}")
    return counts


def _divided(layers: int, parts: int, what: str) -> int:
    if layers < 0 or layers % parts:
        raise ValueError(f"{layers} decoder layers do not divide among {parts} {what}")
    return layers // parts
