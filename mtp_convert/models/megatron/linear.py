"""Linear layers cut over tensor parallel ranks, and the embedding.

`column` layers hold a block of the output features (rows of the weight), `row` layers a block of the input features.
They compute with what they hold: running a model needs tensor parallel groups of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import EmptyState, MegatronModule, Metadata, NoneState, fresh, share
from mtp_convert.models.megatron.norms import norm_parameters, normalize
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict


class Linear(MegatronModule):
    """y = x W' + b; every tensor rank holds the whole. `input_size` and `output_size` are those of the model."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        rows, columns = self._local_shape(output_size, input_size)
        self.weight = fresh(rows, columns, config=config)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype)) if bias else None

    def _local_shape(self, rows: int, columns: int) -> tuple[int, int]:
        parts, name = self.pg_collection.tp.size(), type(self).__name__
        match self.tp_axes.get("weight"):
            case 0:
                return share(rows, parts, f"output features of {name}"), columns
            case 1:
                return rows, share(columns, parts, f"input features of {name}")
            case _:
                return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., input features] to [..., output features]."""
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(NoneState, Linear):
    """A Linear whose output features are cut over tensor ranks."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}


class RowParallelLinear(NoneState, Linear):
    """A Linear whose input features are cut over tensor ranks; the bias is whole."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 1}


class TELinear(EmptyState, Linear):
    """A whole Linear as TransformerEngine stores it."""


class TEColumnParallelLinear(EmptyState, Linear):
    """A ColumnParallelLinear as TransformerEngine stores it."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}


class TERowParallelLinear(EmptyState, Linear):
    """A RowParallelLinear as TransformerEngine stores it."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 1}


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """A norm over the input features, then a ColumnParallelLinear, in one module."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(input_size, output_size, config=config, bias=bias, pg_collection=pg_collection)
        self.layer_norm_weight, self.layer_norm_bias = norm_parameters(input_size, config)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., input features], normalised first, to [..., output features]."""
        return super().forward(normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.config))


class OutputLayer(ColumnParallelLinear):
    """Hidden states to logits over the vocabulary; without a weight of its own (`allocate`) if it shares one."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, allocate: bool = True
    ) -> None:
        with nullcontext() if allocate else torch.device("meta"):
            super().__init__(config.hidden_size, config.vocab_size, config=config, pg_collection=pg_collection)
        if not allocate:
            self.register_parameter("weight", None)

    def forward(  # type: ignore[override]  # Megatron's signature: the weight can come from outside
        self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Logits [..., V] of `x` [..., H], and no bias. `weight` [V, H] takes the place of the layer's own.

        `runtime_gather_output` changes nothing on whole tensors. ValueError without any weight.
        """
        used = self.weight if weight is None else weight
        if used is None:
            raise ValueError("this output layer shares the embedding's weight, which must be passed")
        return F.linear(x, used, self.bias), None


class VocabParallelEmbedding(MegatronModule):
    """A table [V, H] whose rows are cut over tensor ranks; its stored size may be padded differently."""

    tp_axes: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection)
        rows = share(num_embeddings, pg_collection.tp.size(), "vocabulary")
        self.weight = fresh(rows, embedding_dim, config=config)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., H] of ids [...]."""
        return F.embedding(ids, self.weight)

    def own_entries(self, prefix: str, sharded_offsets: Sequence[Offset], metadata: Metadata) -> ShardedStateDict:
        """The entry of the table."""
        entries = super().own_entries(prefix, sharded_offsets, metadata)
        return {name: replace(entry, allow_shape_mismatch=True) for name, entry in entries.items()}


class LanguageModelEmbedding(MegatronModule):
    """Token embeddings, plus learned positions if the model has them."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, config=config, pg_collection=pg_collection
        )
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=config.params_dtype
            )

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[S, B, H] of `input_ids` and `position_ids` [B, S]."""
        embedded_BSH: Tensor = self.word_embeddings(input_ids)
        if self.config.position_embedding_type == "learned_absolute":
            embedded_BSH = embedded_BSH + self.position_embeddings(position_ids)
        return embedded_BSH.transpose(0, 1).contiguous()
