"""How modules describe what they hold of a checkpoint: one entry per tensor, at any rank of any parallel job.

Groups that are not passed are the current ones (see `groups`), so nothing here needs a running job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtp_convert.models.megatron.entries import (
    Offset,
    ReplicaId,
    ShardedEntry,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    apply_prefix_mapping,
    is_main_replica,
    iter_entries,
    iter_shards,
    map_entries,
    replace_prefix_for_sharding,
)
from mtp_convert.models.megatron.groups import Group, Member, current_groups

__all__ = [
    "Offset",
    "ReplicaId",
    "ShardedEntry",
    "ShardedObject",
    "ShardedStateDict",
    "ShardedTensor",
    "ShardedTensorFactory",
    "apply_factories",
    "apply_factory_merges",
    "apply_prefix_mapping",
    "ensure_metadata_has_dp_cp_group",
    "groups_or_current",
    "is_main_replica",
    "iter_entries",
    "iter_shards",
    "make_sharded_object_for_checkpoint",
    "make_sharded_tensor_for_checkpoint",
    "make_sharded_tensors_for_checkpoint",
    "make_tp_sharded_tensor_for_checkpoint",
    "map_entries",
    "replace_prefix_for_sharding",
    "sharded_state_dict_default",
]


def make_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    prepend_offsets: Iterable[Offset] = (),
    replica_id: ReplicaId | None = None,
    *,
    allow_shape_mismatch: bool = False,
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> ShardedTensor:
    """A tensor that every tensor and data rank holds whole. Replica: (0, tp rank, dp_cp rank)."""
    tp, dp_cp = groups_or_current(tp_group, dp_cp_group)
    offsets = tuple(prepend_offsets)
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *offsets,
        replica_id=(0, tp.rank(), dp_cp.rank()) if replica_id is None else replica_id,
        prepend_axis_num=len(offsets),
        allow_shape_mismatch=allow_shape_mismatch,
    )


def make_tp_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    tp_axis: int = 0,
    replica_id: ReplicaId | None = None,
    prepend_offsets: Iterable[Offset] = (),
    *,
    allow_shape_mismatch: bool = False,
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> ShardedTensor:
    """A tensor of which every tensor rank holds one block along its own axis `tp_axis`. Replica: (0, 0, dp_cp rank)."""
    tp, dp_cp = groups_or_current(tp_group, dp_cp_group)
    offsets = tuple(prepend_offsets)
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *offsets,
        (tp_axis + len(offsets), tp.rank(), tp.size()),
        replica_id=(0, 0, dp_cp.rank()) if replica_id is None else replica_id,
        prepend_axis_num=len(offsets),
        allow_shape_mismatch=allow_shape_mismatch,
    )


def make_sharded_object_for_checkpoint(
    obj: object,
    key: str,
    sharded_offsets: Iterable[Offset] = (),
    replica_id: ReplicaId | None = None,
    *,
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> ShardedObject:
    """An object that every tensor and data rank holds; ValueError unless the offsets are those of axes 0, 1, ..."""
    tp, dp_cp = groups_or_current(tp_group, dp_cp_group)
    offsets = sorted(sharded_offsets) or [(0, 0, 1)]
    if [axis for axis, _, _ in offsets] != list(range(len(offsets))):
        raise ValueError(f"{key}: offsets of axes 0 to {len(offsets) - 1} expected, got {offsets}")
    return ShardedObject(
        key,
        obj,
        global_shape=tuple(count for _, _, count in offsets),
        global_offset=tuple(index for _, index, _ in offsets),
        replica_id=(0, tp.rank(), dp_cp.rank()) if replica_id is None else replica_id,
    )


def make_sharded_tensors_for_checkpoint(
    state_dict: Mapping[str, Any],
    prefix: str,
    tensor_parallel_layers_axis_map: Mapping[str, int] | None = None,
    sharded_offsets: Iterable[Offset] = (),
    extra_state_suffix: str = "_extra_state",
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> ShardedStateDict:
    """An entry for everything in `state_dict`, under `prefix` + name, which is also its key.

    Names that end in `extra_state_suffix` are objects; those in the axis map are split over tensor ranks along the
    given axis; the others are whole on every rank.
    """
    axes = tensor_parallel_layers_axis_map or {}
    offsets = tuple(sharded_offsets)
    tp, dp_cp = groups_or_current(tp_group, dp_cp_group)
    entries: ShardedStateDict = {}
    for name, value in state_dict.items():
        key = prefix + name
        if name.endswith(extra_state_suffix):
            entry: ShardedEntry = make_sharded_object_for_checkpoint(
                value, key, offsets, tp_group=tp, dp_cp_group=dp_cp
            )
        elif name in axes:
            entry = make_tp_sharded_tensor_for_checkpoint(
                value, key, axes[name], prepend_offsets=offsets, tp_group=tp, dp_cp_group=dp_cp
            )
        else:
            entry = make_sharded_tensor_for_checkpoint(value, key, offsets, tp_group=tp, dp_cp_group=dp_cp)
        entries[key] = entry
    return entries


def ensure_metadata_has_dp_cp_group(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """`metadata` with `dp_cp_group`, the current one if it names none; what was passed stays as it is."""
    return {"dp_cp_group": current_groups().dp_cp} | (metadata or {})


def sharded_state_dict_default(
    module: nn.Module,
    prefix: str = "",
    sharded_offsets: Sequence[Offset] = (),
    metadata: dict[str, Any] | None = None,
    tp_group: Group | None = None,
) -> ShardedStateDict:
    """A module's own `sharded_state_dict`, or every tensor of its state whole on every rank if it has none.

    Parameters stay parameters (`keep_vars`), so that optimizer states can be sharded like them.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own = getattr(module, "sharded_state_dict", None)
    if own is not None:
        entries: ShardedStateDict = own(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata)
        return entries
    state = module.state_dict(keep_vars=True)
    groups = {"tp_group": tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, **groups)


def groups_or_current(tp_group: Group | None, dp_cp_group: Group | None) -> tuple[Group, Group]:
    """Without either group the current ones; one alone leaves the other a group of one, as in Megatron."""
    if tp_group is None and dp_cp_group is None:
        return current_groups().tp, current_groups().dp_cp
    return (Member() if tp_group is None else tp_group, Member() if dp_cp_group is None else dp_cp_group)
