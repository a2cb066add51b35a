"""The nouns between file formats and the engine: what is stored where. Nothing here knows a family or a layout."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

from mtp_convert.encodings.dtype import DType

Shape = tuple[int, ...]
LONGEST_NAME = 1024  # characters
MOST_DIMENSIONS = 64


def usable_name(name: object) -> bool:
    """Whether a stored name can be shown as it is: not empty or endless, no control characters, no half characters."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


class StoredChunk(NamedTuple):
    """A box of a tensor, row-major and contiguous, at byte `start` of a file."""

    offset: Shape
    sizes: Shape
    path: Path
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: global shape, and the chunks that tile it."""

    name: str
    dtype: DType
    shape: Shape
    chunks: tuple[StoredChunk, ...]

    @property
    def nbytes(self) -> int:
        """Payload bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @cached_property
    def _by_row(self) -> tuple[tuple[StoredChunk, ...], list[int], int]:
        chunks = tuple(sorted(self.chunks, key=lambda c: c.offset))
        return chunks, [c.offset[0] for c in chunks], max(c.sizes[0] for c in chunks)

    def chunks_in_rows(self, lo: int, hi: int) -> Iterator[StoredChunk]:
        """The chunks that may hold rows [lo, hi) of dimension 0."""
        if len(self.chunks) == 1 or not self.shape:
            yield from self.chunks
            return
        chunks, starts, longest = self._by_row
        yield from chunks[bisect_right(starts, lo - longest) : bisect_left(starts, hi)]


@dataclass(frozen=True)
class Stored:
    """What a container holds.

    tensors: by name; objects: names of non-tensor entries; training: names of optimizer and random states that are
    no weights; arguments: the training arguments of a Megatron checkpoint; files: the files that hold payload;
    headers: the raw header of every safetensors file, so that the same files can be written again.
    """

    container: str
    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    arguments: Mapping[str, object] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    headers: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Payload bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())
