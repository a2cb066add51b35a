"""Lays a plan out as files of a container: safetensors shards or a torch_dist folder. No byte is moved here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod

from mtp_convert.containers import safetensors, torch_dist_write, torch_save
from mtp_convert.containers.base import Shape, StoredTensor
from mtp_convert.containers.torch_dist_write import Entry
from mtp_convert.encodings.dtype import DType
from mtp_convert.engine.files import Extent, Literal, OutFile, TensorExtent
from mtp_convert.mapping.plan import Step


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A target tensor with its element type; `known`: its bytes, where they need no step."""

    step: Step
    dtype: DType
    known: bytes | None = None

    @property
    def name(self) -> str:
        """Name in the target layout."""
        return self.step.tensor

    @property
    def shape(self) -> Shape:
        """Shape as written."""
        return self.step.shape

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def extent(self, tensors: Mapping[str, StoredTensor], offset: Shape, sizes: Shape) -> TensorExtent:
        """The chunk at `offset` of `sizes`."""
        return TensorExtent(self.step, tensors, self.dtype, offset, sizes, self.known)

    def whole(self, tensors: Mapping[str, StoredTensor]) -> TensorExtent:
        """The tensor as one chunk."""
        return self.extent(tensors, (0,) * len(self.shape), self.shape)


@dataclass(frozen=True, slots=True)
class OutRaw:
    """A target tensor whose bytes are no values of a step: codes, scales, or a copy of something stored."""

    name: str
    dtype: DType
    shape: Shape
    content: Extent

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return self.content.nbytes

    def whole(self, tensors: Mapping[str, StoredTensor]) -> Extent:
        """The tensor as one chunk."""
        return self.content


Out = OutTensor | OutRaw


@dataclass(frozen=True)
class Output:
    """Files with payload, and what is written after them in this order (indices last)."""

    files: tuple[OutFile, ...]
    small: Mapping[str, Callable[[], bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload files."""
        return sum(f.size for f in self.files)


def safetensors_output(
    tensors: Sequence[Out],
    source: Mapping[str, StoredTensor],
    *,
    max_shard_size: int,
    headers: Mapping[str, bytes] | None = None,
    index: bytes | None = None,
) -> Output:
    """Shards of at most `max_shard_size` bytes, or exactly what `headers` and `index` describe if that fits."""
    restored = _restored(tensors, source, headers) if headers else None
    files, where = restored or _sharded(tensors, source, max_shard_size)
    if len(files) == 1 and not (restored and index):
        return Output(files, {})
    if index is None or not restored or _weight_map(index) != where:
        total = sum(t.nbytes for t in tensors)
        made = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        index = (json.dumps(made, indent=2) + "\n").encode()
    return Output(files, {safetensors.INDEX: partial(bytes, index)})


def _weight_map(index: bytes) -> object:
    """The table inside an index file, or None."""
    try:
        data = json.loads(index)
    except ValueError:
        return None
    return data.get("weight_map") if isinstance(data, dict) else None


Shards = tuple[tuple[OutFile, ...], dict[str, str]]


def _sharded(tensors: Sequence[Out], source: Mapping[str, StoredTensor], limit: int) -> Shards:
    shards: list[list[Out]] = [[]]
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    count = len(shards)
    files, where = [], {}
    for i, members in enumerate(shards, 1):
        path = safetensors.SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        described = [(t.name, t.dtype.name, t.shape, t.nbytes) for t in members]
        header = safetensors.header_bytes(described, {"format": "pt"})
        files.append(_file(path, header, members, source))
        where.update({t.name: path for t in members})
    return tuple(files), where


def _file(path: str, header: bytes, members: Sequence[Out], source: Mapping[str, StoredTensor]) -> OutFile:
    return OutFile(
        path,
        [Literal(struct.pack("<Q", len(header)) + header), *(t.whole(source) for t in members)],
    )


def _restored(
    tensors: Sequence[Out], source: Mapping[str, StoredTensor], headers: Mapping[str, bytes]
) -> Shards | None:
    """The shards that the headers describe, if they hold exactly these names, types and shapes without a gap."""
    by_name = {t.name: t for t in tensors}
    files, where = [], {}
    for path, raw in headers.items():
        members = _members(raw, by_name)
        if members is None:
            return None
        where.update({t.name: path for t in members})
        files.append(_file(path, raw, members, source))
    return (tuple(files), where) if where.keys() == by_name.keys() else None


def _members(raw: bytes, by_name: Mapping[str, Out]) -> list[Out] | None:
    """The tensors of one header in storage order; None if it is not a header of these tensors."""
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        names = sorted(entries, key=lambda n: (entries[n]["data_offsets"], n))
        members = [by_name[n] for n in names]
        at = 0
        for t in members:
            described = {"dtype": t.dtype.name, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
            if entries[t.name] != described:
                return None
            at += t.nbytes
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return members


def torch_dist_output(
    tensors: Sequence[OutTensor],
    source: Mapping[str, StoredTensor],
    *,
    folder: str,
    objects: Sequence[str],
    max_file_size: int,
) -> Output:
    """`.distcp` files below `folder` and their `.metadata`; one chunk per matrix, also inside stacks."""
    layout = _DistFiles(folder, max_file_size)
    for t in tensors:
        for offset, sizes in _chunks(t):
            frame = torch_save.frame(t.dtype, sizes)
            parts: list[Extent] = [
                Literal(frame.prefix),
                t.extent(source, offset, sizes),
                Literal(frame.suffix),
            ]
            layout.add(t.name, parts, offset, sizes)
    if objects:
        # All modules have the same empty state: one stored item, named by every key.
        layout.add(objects[0], [Literal(torch_dist_write.extra_state())], None, ())
        for key in objects[1:]:
            layout.entries[key] = layout.entries[objects[0]]
    described = {t.name: (t.dtype, t.shape) for t in tensors}

    def metadata() -> bytes:
        return torch_dist_write.metadata_bytes(described, layout.entries, objects)

    return Output(tuple(layout.files()), {f"{folder}/.metadata": metadata})


def _chunks(tensor: OutTensor) -> Iterator[tuple[Shape, Shape]]:
    n = tensor.step.binding.stacked
    inner = tensor.shape[n:]
    for index in product(*(range(d) for d in tensor.shape[:n])):
        yield (*index, *(0,) * len(inner)), (*(1,) * n, *inner)


class _DistFiles:
    """Collects items into files of limited size."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.extents: list[list[Extent]] = [[]]
        self.size = 0
        self.entries: dict[str, list[Entry]] = {}

    def add(self, name: str, parts: list[Extent], offset: Shape | None, sizes: Shape) -> None:
        length = sum(p.nbytes for p in parts)
        if self.extents[-1] and self.size + length > self.limit:
            self.extents.append([])
            self.size = 0
        file = f"__0_{len(self.extents) - 1}.distcp"
        self.entries.setdefault(name, []).append(Entry(offset, sizes, file, self.size, length))
        self.extents[-1] += parts
        self.size += length

    def files(self) -> Iterator[OutFile]:
        for i, extents in enumerate(self.extents):
            yield OutFile(f"{self.folder}/__0_{i}.distcp", extents)
