"""Routed experts: all in one module, or a feed-forward block each. Both are stored under the same keys.

Expert ranks hold consecutive experts, renumbered from 0; in a checkpoint they have their global number, as an axis in
front of the weight or, with `singleton_local_shards`, in the key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.factories import apply_swiglu_sharded_factory
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.mlp import MLP, MLPSubmodules, activate, fc1_size, weighted_linear
from mtp_convert.models.megatron.module import EmptyState, MegatronModule, Metadata, fresh, share
from mtp_convert.models.megatron.sharding import (
    Offset,
    ShardedStateDict,
    make_sharded_tensors_for_checkpoint,
    replace_prefix_for_sharding,
)


class Experts(MegatronModule, ABC):
    """This rank's experts. Their tensors are cut over the expert tensor group, copies lie in the expert data group."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        groups = self.pg_collection
        self.pg_collection = replace(groups, tp=groups.expt_tp, dp_cp=groups.expt_dp)
        self.count = share(config.num_moe_experts or 0, groups.ep.size(), "experts")
        self.first = groups.ep.rank() * self.count
        self.outer = config.moe_latent_size or config.hidden_size

    @abstractmethod
    def forward(self, x_TL: Tensor, expert: int, weights_T: Tensor) -> Tensor:
        """Outputs [T, L] of local expert number `expert` for its tokens `x_TL`, scaled by `weights_T`."""

    def places(
        self, prefix: str, sharded_offsets: Sequence[Offset], metadata: Metadata
    ) -> Iterator[tuple[int, str, tuple[Offset, ...]]]:
        """Of every local expert: its number, the prefix of its keys, and the offsets of its axes."""
        for local in range(self.count):
            expert = self.first + local
            if metadata.get("singleton_local_shards", False):
                yield local, f"{prefix}experts.{expert}.", tuple(sharded_offsets)
            else:
                axis = (len(sharded_offsets), expert, self.count * self.pg_collection.ep.size())
                yield local, f"{prefix}experts.", (*sharded_offsets, axis)


class GroupedLinear(EmptyState, MegatronModule):
    """One linear per expert, `weight0`, `weight1`, ...; `axis` is the one that tensor ranks cut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        count: int,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        axis: int,
    ) -> None:
        super().__init__(config, groups)
        self.axis = axis
        shape = [outputs, inputs]
        shape[axis] = share(shape[axis], groups.tp.size(), "features of grouped experts")
        for expert in range(count):
            self.register_parameter(f"weight{expert}", fresh(*shape, config=config))
            if config.add_bias_linear:
                bias = torch.zeros(shape[0], dtype=config.params_dtype)
                self.register_parameter(f"bias{expert}", nn.Parameter(bias))

    def of(self, expert: int) -> dict[str, Tensor]:
        """The weight, and bias if there is one, of an expert."""
        return {n: p for n in ("weight", "bias") if isinstance(p := getattr(self, f"{n}{expert}", None), Tensor)}


class TEGroupedMLP(Experts):
    """Experts whose weights stand in two modules, as TransformerEngine's grouped linears hold them."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        inner, shared = config.moe_ffn_hidden_size, (self.count, config, self.pg_collection)
        self.linear_fc1 = GroupedLinear(self.outer, fc1_size(inner, config), *shared, axis=0)
        self.linear_fc2 = GroupedLinear(inner, self.outer, *shared, axis=1)

    def forward(self, x_TL: Tensor, expert: int, weights_T: Tensor) -> Tensor:
        """See Experts."""
        first, last = self.linear_fc1.of(expert), self.linear_fc2.of(expert)
        inner = activate(F.linear(x_TL, first["weight"], first.get("bias")), self.config)
        return weighted_linear(inner, weights_T, last["weight"], last.get("bias"))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """Expert by expert, each with a state of its own."""
        metadata = self.complete(metadata)
        entries: ShardedStateDict = {}
        for local, key, offsets in self.places(prefix, sharded_offsets, metadata):
            for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
                own = self._entries_of(linear, local, f"{key}{name}.", offsets)
                if name == "linear_fc1" and self.config.gated_linear_unit:
                    singleton = metadata.get("singleton_local_shards", False)
                    for leaf in own.keys() - {"_extra_state"}:
                        own[leaf] = apply_swiglu_sharded_factory(own[leaf], offsets, singleton)
                # the first expert's state goes by the name of the one state that the module holds for all
                entries |= {
                    f"{prefix}{name}.{leaf}{local or '' if leaf == '_extra_state' else local}": entry
                    for leaf, entry in own.items()
                }
        return entries

    def _entries_of(self, linear: GroupedLinear, local: int, key: str, offsets: Sequence[Offset]) -> dict[str, Any]:
        """The entries of one expert's linear by their last name."""
        own = {**linear.of(local), "_extra_state": linear.get_extra_state()}
        axes = {"weight": linear.axis} | ({"bias": 0} if linear.axis == 0 else {})
        groups = self.pg_collection
        entries = make_sharded_tensors_for_checkpoint(
            own, key, axes, offsets, tp_group=groups.tp, dp_cp_group=groups.dp_cp
        )
        return {name.removeprefix(key): entry for name, entry in entries.items()}


class SequentialMLP(Experts):
    """Experts as feed-forward blocks of their own, `local_experts.0`, `local_experts.1`, ..."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        self.local_experts = nn.ModuleList(
            MLP(config, submodules, self.pg_collection, outer=self.outer, inner=config.moe_ffn_hidden_size)
            for _ in range(self.count)
        )

    def forward(self, x_TL: Tensor, expert: int, weights_T: Tensor) -> Tensor:
        """See Experts."""
        output: Tensor = self.local_experts[expert](x_TL, weights_T)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """Expert by expert, under the keys of grouped experts."""
        metadata = self.complete(metadata)
        entries: ShardedStateDict = {}
        for local, key, offsets in self.places(prefix, sharded_offsets, metadata):
            name = f"{prefix}local_experts.{local}."
            expert = self.local_experts[local]
            assert isinstance(expert, MLP)
            own = expert.sharded_state_dict(name, offsets, metadata | {"dp_cp_group": self.pg_collection.dp_cp})
            replace_prefix_for_sharding(own, name, key)
            entries |= own
        return entries
