"""What an output file will hold, known to the last byte before the first one is written.

A file is a row of extents: literal bytes (headers, framing) and tensor chunks. Any window of it can be filled on its
own, so windows need no order, no queue and no memory beyond their own size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np

from mtp_convert.containers.base import StoredTensor
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.engine.gather import Bytes, Reader, add_values, cast_values, copy_bytes
from mtp_convert.engine.pieces import Piece, pieces_of
from mtp_convert.mapping.plan import Step, covered
from mtp_convert.mapping.views import Shape


class Extent(Protocol):
    """Some bytes of an output file that can be produced in any part."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Write bytes [lo, hi) of the extent into `out`."""


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are known already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Copy the wanted part."""
        out[:] = np.frombuffer(self.data, dtype=np.uint8)[lo:hi]


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """The chunk of a target tensor at `offset` of `sizes`, as `dtype`, gathered from the source when needed.

    known: the bytes of the whole tensor, where nothing needs to be gathered.
    """

    step: Step
    tensors: Mapping[str, StoredTensor]
    dtype: DType
    offset: Shape
    sizes: Shape
    known: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return prod(self.sizes) * self.dtype.itemsize

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Copy bytes; values are only touched where they are averaged or shifted or change their element type."""
        if self.known is not None:
            whole = np.frombuffer(self.known, dtype=f"V{self.dtype.itemsize}").reshape(self.step.shape)
            box = whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.sizes, strict=True))]
            out[:] = np.frombuffer(box.tobytes(), dtype=np.uint8)[lo:hi]
            return
        if not covered(self.step):
            out[:] = 0  # vocabulary padding
        n = self.dtype.itemsize
        first, last = lo // n, -(-hi // n)  # elements that the bytes belong to
        averaged, shift = self.step.averaged, self.step.shift
        values: Bytes | None = None
        sums = np.zeros(last - first, dtype=np.float64) if averaged > 1 or shift else None
        for piece in pieces_of(self.step, self.tensors, offset=self.offset, sizes=self.sizes):
            if sums is not None:
                add_values(reader, piece, sums, lo=first, hi=last)
            elif isinstance(piece, Piece) and piece.dtype == self.dtype:
                copy_bytes(reader, piece, out, lo=lo, hi=hi)
            else:
                if values is None:
                    values = np.zeros((last - first) * n, dtype=np.uint8)
                cast_values(reader, piece, values, lo=first, hi=last, to=self.dtype)
        if sums is not None:
            values = cast((sums / averaged + shift).view(np.uint8), BY_NAME["F64"], self.dtype.torch_name)
        if values is not None:
            out[:] = values[lo - first * n : hi - first * n]


@dataclass(frozen=True)
class OutFile:
    """One output file: path below the output folder, and its extents in order."""

    path: str
    extents: Sequence[Extent]

    @cached_property
    def starts(self) -> list[int]:
        """First byte of every extent, and the size of the file at the end."""
        starts = [0]
        for extent in self.extents:
            starts.append(starts[-1] + extent.nbytes)
        return starts

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.starts[-1]

    def fill(self, reader: Reader, out: Bytes, at: int) -> None:
        """Write the bytes of the file from position `at` into all of `out`."""
        end = at + len(out)
        i = bisect_right(self.starts, at) - 1
        while i < len(self.extents) and self.starts[i] < end:
            start, stop = self.starts[i], self.starts[i + 1]
            lo, hi = max(at, start), min(end, stop)
            if lo < hi:
                self.extents[i].fill(reader, out[lo - at : hi - at], lo - start, hi - start)
            i += 1
