"""The nouns between file formats and the engine: what is stored where. Nothing here knows a family or a layout."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mtp_convert.encodings.dtype import DType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mtp_convert.encodings.scheme import Scheme  # needs numpy, which reading headers does not

Shape = tuple[int, ...]
LONGEST_NAME = 1024  # characters
MOST_DIMENSIONS = 64


def usable_name(name: object) -> bool:
    """Whether a stored name can be shown as it is: not empty or endless, no control characters, no half characters."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


class Live(Protocol):
    """Bytes that are in no file: a tensor of a running model."""

    @property
    def name(self) -> str:
        """What an error message calls the place."""

    def read_into(self, at: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` from byte `at`."""


Place = Path | Live


class StoredChunk(NamedTuple):
    """A box of a tensor, row-major and contiguous, at byte `start` of a file (or of a live tensor)."""

    offset: Shape
    sizes: Shape
    path: Place
    start: int


@dataclass(frozen=True)
class Encoded:
    """The raw tensors that make one tensor of values: its codes, the scales of its blocks, the scale of all of it."""

    scheme: Scheme
    codes: StoredTensor
    scales: StoredTensor | None = None
    whole: StoredTensor | None = None

    @property
    def raw(self) -> tuple[StoredTensor, ...]:
        """Every raw tensor."""
        return tuple(t for t in (self.codes, self.scales, self.whole) if t is not None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: global shape, and the chunks that tile it.

    encoding: how the values are made where the bytes are codes; shape and dtype are then those of the values.
    """

    name: str
    dtype: DType
    shape: Shape
    chunks: tuple[StoredChunk, ...]
    encoding: Encoded | None = None

    @property
    def nbytes(self) -> int:
        """Payload bytes of the whole tensor."""
        if self.encoding is not None:
            return sum(t.nbytes for t in self.encoding.raw)
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
    headers: the raw header of every safetensors file, so that the same files can be written again. replicas: pieces of
    tensors with a second copy of each that another rank stores; parallel: the parallel sizes of a sharded checkpoint.
    raw: where values are encoded, every tensor of the files; beside: those of them that are no part of a value (scales
    of activations and caches), with the tensor they belong to.
    """

    container: str
    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    arguments: Mapping[str, object] = field(default_factory=dict)
    files: tuple[Place, ...] = ()
    headers: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    replicas: tuple[tuple[StoredTensor, StoredTensor], ...] = field(default=(), repr=False)
    parallel: Mapping[str, int] = field(default_factory=dict)
    raw: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Payload bytes of all tensors."""
        return sum(t.nbytes for t in self.in_files.values())

    @property
    def here(self) -> bool:
        """Whether the payload is on this machine, all of it."""
        return all(isinstance(place, Path) and place.is_file() for place in self.files)

    @property
    def in_files(self) -> Mapping[str, StoredTensor]:
        """The tensors under the names in the files: codes and scales each for themselves."""
        return self.raw or self.tensors
