"""One layer of a model: attention and feed-forward blocks, or a Mamba mixer, each added to its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.moe import MoELayer
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
    self_attention_hyper_connection: Any = None
    mlp_hyper_connection: Any = None
    sharded_state_dict_keys_map: Mapping[str, str] = field(default_factory=dict)


class TransformerLayer(MegatronModule):
    """Attention, then feed-forward, each behind its norm and around a residual or a hyper-connection.

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
        self.self_attention_hyper_connection = block(submodules.self_attention_hyper_connection)
        self.mlp_hyper_connection = block(submodules.mlp_hyper_connection)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """[S, B, H] of [S, B, H], or [S, B, n * H] of n streams. `input_ids` [B, S] are for experts chosen by them.

        See SelfAttention for the other arguments.
        """

        def attend(x: Tensor) -> Tensor:
            mixed: Tensor = self.self_attention(
                x if self.input_layernorm is None else self.input_layernorm(x),
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
            )
            return mixed

        def feed_forward(x: Tensor) -> Tensor:
            normed = x if self.pre_mlp_layernorm is None else self.pre_mlp_layernorm(x)
            output: Tensor = self.mlp(normed, input_ids) if isinstance(self.mlp, MoELayer) else self.mlp(normed)
            return output

        if self.self_attention is not None:
            hidden_states = _connect(hidden_states, attend, self.self_attention_hyper_connection)
        if self.mlp is not None:
            hidden_states = _connect(hidden_states, feed_forward, self.mlp_hyper_connection)
        return hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's, with keys renamed as the submodules say."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(entries, {prefix + old: prefix + new for old, new in self.keys_map.items()})
        return entries


def _connect(hidden_states: Tensor, block: Callable[[Tensor], Tensor], connection: Any) -> Tensor:  # noqa: ANN401
    """Hidden states or streams behind a block."""
    if connection is None:
        return hidden_states + block(hidden_states)
    streams: Tensor = connection(hidden_states, block)
    return streams


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
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """[S, B, H] of [S, B, H]; the mixer is causal by itself and needs neither mask nor positions nor ids."""
        mixed: Tensor = self.mixer(hidden_states, packed_seq_params)
        return hidden_states + mixed
