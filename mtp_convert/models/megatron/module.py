"""The base of all modules of a Megatron tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection, current_groups
from mtp_convert.models.megatron.sharding import (
    Offset,
    ShardedStateDict,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

Metadata = dict[str, Any]


class MegatronModule(nn.Module):
    """A module that knows the model's settings, its process groups, and its part of a sharded checkpoint.

    Parameters have this rank's sizes. `tp_axes` names the parameters of which tensor ranks hold blocks, with the axis.
    """

    tp_axes: ClassVar[Mapping[str, int]] = {}

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()
        self.config = config
        self.pg_collection = current_groups() if pg_collection is None else pg_collection

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """An entry for everything in the state dict, below `prefix`.

        `sharded_offsets` are axes that the modules around this one add in front of every tensor (layer, expert).
        `metadata` may hold `dp_cp_group`, `singleton_local_shards` (one tensor per expert and for gate and up) and
        `non_homogeneous_layers` (decoder layers one by one).
        """
        metadata = self.complete(metadata)
        entries = self.own_entries(prefix, sharded_offsets, metadata)
        for name, child in self.named_children():
            entries |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.pg_collection.tp
            )
        return entries

    def own_entries(self, prefix: str, sharded_offsets: Sequence[Offset], metadata: Metadata) -> ShardedStateDict:
        """The entries of what this module holds itself."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            self.tp_axes,
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def complete(self, metadata: Metadata | None) -> Metadata:
        """`metadata` with the group of a tensor's copies."""
        return {"dp_cp_group": self.pg_collection.dp_cp} | (metadata or {})


class EmptyState:
    """For modules that store an empty state beside their weights, as TransformerEngine's do without FP8."""

    def get_extra_state(self) -> Tensor | None:
        """Nothing, in the form in which it is stored."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Nothing is kept."""


class NoneState(EmptyState):
    """For modules that store None as their state, as Megatron's own linears do to match TransformerEngine's."""

    def get_extra_state(self) -> Tensor | None:
        """Nothing, in the form in which it is stored."""
        return None


def fresh(*shape: int, config: TransformerConfig) -> nn.Parameter:
    """A weight to train from: normal, `init_method_std`."""
    return nn.Parameter(torch.empty(shape, dtype=config.params_dtype).normal_(std=config.init_method_std))


def share(total: int, parts: int, what: str) -> int:
    """What each of `parts` ranks holds of `total`; ValueError if it does not divide."""
    if total % parts:
        raise ValueError(f"{what}: {total} does not divide among {parts} ranks")
    return total // parts
