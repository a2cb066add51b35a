"""The feed-forward block, gated or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.factories import apply_swiglu_sharded_factory
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict
from mtp_convert.models.megatron.spec import build_module

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def activate(x: Tensor, config: TransformerConfig) -> Tensor:
    """The inner activation [..., F] of [..., F], or of [gate; up] [..., 2F] if units are gated."""
    activation = _ACTIVATIONS[config.activation]
    if not config.gated_linear_unit:
        return activation(x)
    gate, up = x.chunk(2, -1)
    if (limit := config.activation_func_clamp_value) is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return activation(gate) * up


def weighted_linear(x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(x W' + b) times `weights` [...], the units [..., F] of `x` being scaled before they are summed."""
    output = F.linear((x * weights[..., None]).to(x.dtype), weight)
    return output if bias is None else output + (bias * weights[..., None]).to(x.dtype)


def fc1_size(inner: int, config: TransformerConfig) -> int:
    """Output features of the first linear for `inner` units."""
    return 2 * inner if config.gated_linear_unit else inner


@dataclass(frozen=True)
class MLPSubmodules:
    """The modules inside a feed-forward block."""

    linear_fc1: Any
    linear_fc2: Any


class MLP(MegatronModule):
    """`linear_fc1` to `inner` units (gate rows before up rows), activation, `linear_fc2` back."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        outer: int | None = None,
        inner: int | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        outer = config.hidden_size if outer is None else outer
        inner = config.ffn_hidden_size if inner is None else inner
        shared: dict[str, Any] = {
            "config": config,
            "bias": config.add_bias_linear,
            "pg_collection": self.pg_collection,
        }
        self.linear_fc1 = build_module(submodules.linear_fc1, outer, fc1_size(inner, config), **shared)
        self.linear_fc2 = build_module(submodules.linear_fc2, inner, outer, **shared)

    def forward(self, hidden_states: Tensor, weights: Tensor | None = None) -> Tensor:
        """[..., H] of [..., H]; `weights` [...] scale the result of every token, as experts need it."""
        inner, last = activate(self.linear_fc1(hidden_states), self.config), self.linear_fc2
        output: Tensor = last(inner) if weights is None else weighted_linear(inner, weights, last.weight, last.bias)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's, with gate and up stored apart."""
        metadata = self.complete(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.gated_linear_unit:
            singleton = metadata.get("singleton_local_shards", False)
            for name in (f"{prefix}linear_fc1.weight", f"{prefix}linear_fc1.bias"):
                if name in entries:
                    entries[name] = apply_swiglu_sharded_factory(entries[name], sharded_offsets, singleton)
        return entries
