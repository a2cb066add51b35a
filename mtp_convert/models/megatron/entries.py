"""Sharded state dicts: which slice of which global tensor a rank's module holds, and under which key.

Megatron's checkpoint keys, global shapes and the splits of fused weights are decided here and nowhere else. An entry is

    ShardedTensor         a local tensor as one block of a global tensor
    ShardedObject         anything that is stored whole, numbered instead of sliced (`_extra_state`)
    ShardedTensorFactory  a local tensor that is stored as several entries, with the way back

Entries are frozen: renaming replaces them in their dict. Equality looks at everything but the data. An offset is
`(axis, index, count)`: along `axis` of the global tensor this is block `index` of `count` equal ones. Offsets given as
`sharded_offsets` or `prepend_offsets` add their axes in front of the tensor's own (layer, expert).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

Offset = tuple[int, int, int]
ReplicaId = int | tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShardedTensor:
    """A local tensor as one block of a global tensor.

    `local_shape` is the data's; `global_shape` and `global_offset` count elements and have `prepend_axis_num` more axes
    in front, of local size 1. `axis_fragmentations` counts the blocks along each global axis, or is None for an
    irregular grid. Equal blocks on other ranks differ in `replica_id`; only the one made of zeros is written.
    `allow_shape_mismatch` marks padded tensors, whose stored size may differ. Raises ValueError if these disagree.
    """

    key: str
    data: Tensor | None = field(repr=False, compare=False)
    dtype: torch.dtype
    local_shape: Shape
    global_shape: Shape
    global_offset: Shape
    axis_fragmentations: Shape | None
    replica_id: ReplicaId = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError(f"{self.key}: {'; '.join(problems)}")

    def _problems(self) -> Iterator[str]:
        if self.data is not None and (self.data.dtype, tuple(self.data.shape)) != (self.dtype, self.local_shape):
            yield f"data is {self.data.dtype} {tuple(self.data.shape)}, expected {self.dtype} {self.local_shape}"
        axes = self.prepend_axis_num + len(self.local_shape)
        for name in ("global_shape", "global_offset", "axis_fragmentations"):
            given = getattr(self, name)
            if given is not None and len(given) != axes:
                yield f"{name} {given} has {len(given)} axes, expected {axes}"
        if self.axis_fragmentations is not None:
            inner = zip(self.global_offset[self.prepend_axis_num :], self.local_shape, strict=False)
            if any(size and offset % size for offset, size in inner):
                yield f"global offset {self.global_offset} is no multiple of the local shape {self.local_shape}"

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: Tensor,
        *rank_offsets: Offset,
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        allow_shape_mismatch: bool = False,
    ) -> Self:
        """Place `data` by block numbers; axes without an offset are whole. ValueError for an offset out of range."""
        local = (1,) * prepend_axis_num + tuple(data.shape)
        index, count = [0] * len(local), [1] * len(local)
        for axis, block, blocks in rank_offsets:
            if not (0 <= axis < len(local) and 0 <= block < blocks):
                raise ValueError(f"{key}: offset {(axis, block, blocks)} does not fit {len(local)} axes")
            index[axis], count[axis] = block, blocks
        return cls(
            key,
            data,
            data.dtype,
            tuple(data.shape),
            tuple(n * size for n, size in zip(count, local, strict=True)),
            tuple(i * size for i, size in zip(index, local, strict=True)),
            tuple(count),
            replica_id,
            prepend_axis_num,
            allow_shape_mismatch,
        )

    def global_slice(self) -> tuple[int | slice, ...]:
        """The index that takes this block out of the global tensor."""
        outer, inner = self.global_offset[: self.prepend_axis_num], self.global_offset[self.prepend_axis_num :]
        return (*outer, *(slice(o, o + size) for o, size in zip(inner, self.local_shape, strict=True)))

    def narrow(self, dim: int, start: int, length: int) -> Self:
        """What remains when every rank keeps `length` of its elements along its own `dim`, from `start` on."""
        size, axis = self.local_shape[dim], dim + self.prepend_axis_num

        def scaled(shape: Shape) -> Shape:
            if shape[axis] % size:
                raise ValueError(f"{self.key}: blocks of {size} do not tile axis {axis} of {shape}")
            return (*shape[:axis], shape[axis] // size * length, *shape[axis + 1 :])

        return replace(
            self,
            data=None if self.data is None else self.data.narrow(dim, start, length),
            local_shape=(*self.local_shape[:dim], length, *self.local_shape[dim + 1 :]),
            global_shape=scaled(self.global_shape),
            global_offset=scaled(self.global_offset),
        )

    def without_data(self) -> Self:
        """The same place, holding nothing."""
        return replace(self, data=None)


@dataclass(frozen=True)
class ShardedObject:
    """Shard `global_offset` of an object stored in `global_shape` shards, each whole."""

    key: str
    data: object = field(repr=False, compare=False)
    global_shape: Shape
    global_offset: Shape
    replica_id: ReplicaId = 0

    def __post_init__(self) -> None:
        if len(self.global_shape) != len(self.global_offset):
            raise ValueError(f"{self.key}: offset {self.global_offset} does not fit shape {self.global_shape}")

    @property
    def unique_key(self) -> str:
        """The name in a checkpoint, such as `mtp.layers.0.eh_proj._extra_state/shard_0_1`."""
        return f"{self.key}/shard_{'.'.join(map(str, self.global_offset))}_{'.'.join(map(str, self.global_shape))}"

    @classmethod
    def empty_from_unique_key(cls, unique_key: str, replica_id: ReplicaId = 0) -> Self:
        """The entry of a name in a checkpoint, without data; ValueError if the name is not of that form."""
        key, found, shard = unique_key.rpartition("/shard_")
        numbers = [part.split(".") for part in shard.split("_")]
        if not found or len(numbers) != 2 or not all(n.isdecimal() for part in numbers for n in part):
            raise ValueError(f"expected KEY/shard_OFFSET_SHAPE, got {unique_key!r}")
        offset, shape = (tuple(map(int, part)) for part in numbers)
        return cls(key, None, shape, offset, replica_id)

    def without_data(self) -> Self:
        """The same place, holding nothing."""
        return replace(self, data=None)


@dataclass(frozen=True)
class ShardedTensorFactory:
    """A tensor stored as several entries.

    `build_fn(key, data, replica_id)` gives the entries, `merge_fn` makes the tensor from what was loaded for them, in
    the same order. The result depends on these arguments alone, so that optimizer states can take the weight's place.
    """

    key: str
    data: Tensor | None = field(repr=False, compare=False)
    build_fn: Callable[[str, Tensor, ReplicaId], list[ShardedTensor]] = field(repr=False, compare=False)
    merge_fn: Callable[[list[Tensor]], Tensor] = field(repr=False, compare=False)
    replica_id: ReplicaId = 0

    def build(self) -> list[ShardedTensor]:
        """The entries; ValueError without data."""
        if self.data is None:
            raise ValueError(f"{self.key}: a factory without data builds nothing")
        return self.build_fn(self.key, self.data, self.replica_id)

    def without_data(self) -> Self:
        """The same factory, holding nothing."""
        return replace(self, data=None)


ShardedEntry = ShardedTensor | ShardedObject | ShardedTensorFactory
ShardedStateDict = dict[str, Any]  # module names to entries; dicts and lists may nest


def is_main_replica(replica_id: ReplicaId) -> bool:
    """Whether this copy is the one that is written."""
    return not any((replica_id,) if isinstance(replica_id, int) else replica_id)


def iter_entries(tree: object) -> Iterator[ShardedEntry]:
    """Every entry inside nested dicts and lists, in order."""
    if isinstance(tree, ShardedEntry):
        yield tree
    elif isinstance(tree, Mapping | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from iter_entries(part)


def iter_shards(tree: object) -> Iterator[ShardedTensor | ShardedObject]:
    """Every entry that is stored, factories built, in order."""
    for entry in iter_entries(tree):
        yield from entry.build() if isinstance(entry, ShardedTensorFactory) else (entry,)


def map_entries(change: Callable[[ShardedEntry], object], tree: dict[Any, Any] | list[Any]) -> None:
    """Replace every entry inside nested dicts and lists by `change(entry)`, in place; other values stay."""
    places: list[tuple[Any, Any]] = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    for at, value in places:
        if isinstance(value, dict | list):
            map_entries(change, value)
        elif isinstance(value, ShardedEntry):
            tree[at] = change(value)


def apply_factories(sharded_state_dict: ShardedStateDict) -> None:
    """Replace every factory by the list of its entries, in place."""
    map_entries(lambda e: e.build() if isinstance(e, ShardedTensorFactory) else e, sharded_state_dict)


def apply_factory_merges(loaded: Any, factories: Any) -> Any:  # noqa: ANN401  (a tree of tensors)
    """Merge, in place, what was loaded for every factory of `factories`, a tree whose other leaves do not matter.

    Returns the tree, or the merged tensor where `factories` is a factory itself. KeyError for a factory without data
    in `loaded`.
    """
    if isinstance(factories, ShardedTensorFactory):
        return factories.merge_fn(loaded)
    if isinstance(factories, dict | list):
        for at, part in factories.items() if isinstance(factories, dict) else enumerate(factories):
            if isinstance(part, ShardedTensorFactory | dict | list):
                loaded[at] = apply_factory_merges(loaded[at], part)
    return loaded


def replace_prefix_for_sharding(sharded_state_dict: ShardedStateDict, old_prefix: str, new_prefix: str) -> None:
    """Change the prefix of every entry's key in place, not the dict's own names.

    ValueError, naming all of them, if keys start otherwise; then nothing is changed.
    """
    if wrong := [e.key for e in iter_entries(sharded_state_dict) if not e.key.startswith(old_prefix)]:
        raise ValueError(f"keys do not start with {old_prefix!r}: {', '.join(wrong)}")
    apply_prefix_mapping(sharded_state_dict, {old_prefix: new_prefix})


def apply_prefix_mapping(sharded_state_dict: ShardedStateDict, prefix_map: Mapping[str, str]) -> None:
    """Change, in place, the keys that start with one of `prefix_map`'s old prefixes; the first that fits counts."""

    def renamed(entry: ShardedEntry) -> ShardedEntry:
        for old, new in prefix_map.items():
            if entry.key.startswith(old):
                return replace(entry, key=new + entry.key.removeprefix(old))
        return entry

    map_entries(renamed, sharded_state_dict)
