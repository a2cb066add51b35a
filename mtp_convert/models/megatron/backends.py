"""Which classes a model is built from: as TransformerEngine holds weights, or as Megatron's own modules do."""

from __future__ import annotations

from typing import Any, Protocol

from mtp_convert.models.megatron.attention import CoreAttention, TECoreAttention
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.experts import SequentialMLP, TEGroupedMLP
from mtp_convert.models.megatron.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
)
from mtp_convert.models.megatron.mlp import MLPSubmodules
from mtp_convert.models.megatron.norms import Norm, TENorm
from mtp_convert.models.megatron.spec import ModuleSpec


class BackendSpecProvider(Protocol):
    """The choices, under Megatron's names; every result can be given to `build_module`."""

    def linear(self) -> Any:  # noqa: ANN401  (a class or a ModuleSpec)
        """A linear that all tensor ranks hold whole, if the backend has one."""

    def column_parallel_linear(self) -> Any:  # noqa: ANN401
        """A linear cut along its output."""

    def row_parallel_linear(self) -> Any:  # noqa: ANN401
        """A linear cut along its input."""

    def fuse_layernorm_and_linear(self) -> bool:
        """Whether a norm stands inside the linear that follows it."""

    def column_parallel_layer_norm_linear(self) -> Any | None:  # noqa: ANN401
        """A norm and a linear cut along its output in one module, None if not fused."""

    def layer_norm(self) -> Any:  # noqa: ANN401
        """The model's norm."""

    def core_attention(self) -> Any:  # noqa: ANN401
        """Softmax attention."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:  # noqa: ANN401
        """Routed experts, in one module if that is asked for and possible."""


class TESpecProvider:
    """TransformerEngine's way."""

    def linear(self) -> type[TELinear]:
        """See BackendSpecProvider."""
        return TELinear

    def column_parallel_linear(self) -> type[TEColumnParallelLinear]:
        """See BackendSpecProvider."""
        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type[TERowParallelLinear]:
        """See BackendSpecProvider."""
        return TERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """See BackendSpecProvider."""
        return True

    def column_parallel_layer_norm_linear(self) -> type[TELayerNormColumnParallelLinear] | None:
        """See BackendSpecProvider."""
        return TELayerNormColumnParallelLinear

    def layer_norm(self) -> type[TENorm]:
        """See BackendSpecProvider."""
        return TENorm

    def core_attention(self) -> type[TECoreAttention]:
        """See BackendSpecProvider."""
        return TECoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> type[TEGroupedMLP] | ModuleSpec:
        """See BackendSpecProvider."""
        return TEGroupedMLP if moe_use_grouped_gemm else _sequential(self)


class LocalSpecProvider:
    """Megatron's own way."""

    def linear(self) -> type[ColumnParallelLinear]:
        """Cut nevertheless: Megatron has no whole linear of its own."""
        return ColumnParallelLinear

    def column_parallel_linear(self) -> type[ColumnParallelLinear]:
        """See BackendSpecProvider."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type[RowParallelLinear]:
        """See BackendSpecProvider."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """See BackendSpecProvider."""
        return False

    def column_parallel_layer_norm_linear(self) -> type[TELayerNormColumnParallelLinear] | None:
        """See BackendSpecProvider."""
        return None

    def layer_norm(self) -> type[Norm]:
        """See BackendSpecProvider."""
        return Norm

    def core_attention(self) -> type[CoreAttention]:
        """See BackendSpecProvider."""
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ModuleSpec:
        """See BackendSpecProvider."""
        return _sequential(self)


def get_backend(config: TransformerConfig) -> BackendSpecProvider:
    """The backend of a model's `transformer_impl`."""
    return LocalSpecProvider() if config.transformer_impl == "local" else TESpecProvider()


def _sequential(backend: BackendSpecProvider) -> ModuleSpec:
    linears = MLPSubmodules(backend.column_parallel_linear(), backend.row_parallel_linear())
    return ModuleSpec(SequentialMLP, submodules=linears)
