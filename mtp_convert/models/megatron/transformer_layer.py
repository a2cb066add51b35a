"""One layer of a model: attention and feed-forward blocks, or a Mamba mixer, each added to its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict, apply_prefix_mapping
from mtp_convert.models.megatron.spec import build_module


@dataclass(frozen=True)
class TransformerLayerSubmodules:
    """The modules inside a layer; None leaves one out. Norms are left out where the next module normalises.

    `sharded_state_dict_keys_map` renames key prefixes inside the layer, for layers whose checkpoints interchange.
    """

    input_layernorm: Any = None
    self_attention: Any = None
    pre_mlp_layernorm: Any = None
    mlp: Any = None
    sharded_state_dict_keys_map: Mapping[str, str] = field(default_factory=dict)


class TransformerLayer(MegatronModule):
    """Attention, then feed-forward, each behind its norm and around a residual connection.

    `layer_number` counts the model's layers from 1, on whichever stage they are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.layer_number = layer_number
        self.keys_map = submodules.sharded_state_dict_keys_map
        groups = self.pg_collection

        def norm(spec: Any) -> Any:  # noqa: ANN401
            return None if spec is None else build_module(spec, config, config.hidden_size, groups)

        def block(spec: Any) -> Any:  # noqa: ANN401
            return None if spec is None else build_module(spec, config, pg_collection=groups)

        self.input_layernorm = norm(submodules.input_layernorm)
        self.self_attention = block(submodules.self_attention)
        self.pre_mlp_layernorm = norm(submodules.pre_mlp_layernorm)
        self.mlp = block(submodules.mlp)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of [S, B, H]. See SelfAttention for the other arguments."""
        if self.self_attention is not None:
            normed = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
            mixed = self.self_attention(
                normed,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
            )
            hidden_states = hidden_states + mixed
        if self.mlp is not None:
            normed = hidden_states if self.pre_mlp_layernorm is None else self.pre_mlp_layernorm(hidden_states)
            hidden_states = hidden_states + self.mlp(normed)
        return hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's, with keys renamed as the submodules say."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(entries, {prefix + old: prefix + new for old, new in self.keys_map.items()})
        return entries


@dataclass(frozen=True)
class MambaLayerSubmodules:
    """The module inside a Mamba layer."""

    mixer: Any


class MambaLayer(MegatronModule):
    """A Mamba mixer around a residual connection."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.layer_number = layer_number
        self.mixer = build_module(submodules.mixer, config, pg_collection=self.pg_collection)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[S, B, H] of [S, B, H]; the mixer is causal by itself and needs neither mask nor positions."""
        mixed: Tensor = self.mixer(hidden_states, packed_seq_params)
        return hidden_states + mixed
