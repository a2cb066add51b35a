"""Moves the bytes of strided boxes from files into a buffer: byte ranges where possible, strided copies where not.

A box is first reduced to as few axes as possible. What remains decides: one range is one read; long runs are one read
each; short runs are read as one span into a scratch buffer and spread by numpy. Memory is bounded by the scratch size.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_convert.containers.base import Place
from mtp_convert.containers.paths import open_regular
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import DType
from mtp_convert.engine.coded import decode, rounded, strips
from mtp_convert.engine.pieces import CodedPiece, Piece
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.views import Shape, clip

Bytes = npt.NDArray[np.uint8]
SCRATCH = 8 << 20  # bytes; a span longer than this is read in parts
LONG_RUN = 64 << 10  # bytes; from here on a read per run costs less than reading the gaps
OPEN_FILES = 32  # per worker


class Run(NamedTuple):
    """One axis of a reduced box: `n` positions, byte strides on both sides."""

    n: int
    source: int
    target: int


class Reader:
    """One worker's view of the source files: open descriptors and a scratch buffer."""

    def __init__(self) -> None:
        self._fds: OrderedDict[Path, int] = OrderedDict()
        self.scratch: Bytes = np.empty(SCRATCH, dtype=np.uint8)

    def fd(self, path: Path) -> int:
        """An open descriptor; the least recently used one is closed when there are many."""
        fd = self._fds.get(path)
        if fd is None:
            fd = open_regular(path)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._fds[path] = fd
            if len(self._fds) > OPEN_FILES:
                os.close(self._fds.popitem(last=False)[1])
        else:
            self._fds.move_to_end(path)
        return fd

    def close(self) -> None:
        """Close every descriptor."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, path: Place, at: int, out: Bytes) -> None:
        """Fill `out` from position `at` of a file, or of a tensor in memory."""
        if not isinstance(path, Path):
            path.read_into(at, out)
            return
        fd, view, done = self.fd(path), out.data, 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done:]], at + done)
            except OSError as error:
                raise ConvertError("MTP042", Problem(error.strerror or str(error), str(path))) from error
            if n == 0:
                raise ConvertError("MTP041", Problem("file became shorter while it was read", path.name))
            done += n

    def dense(self, path: Place, base: int, sizes: Shape, strides: Shape, itemsize: int) -> Bytes:
        """A strided box of elements, strides in bytes, as contiguous bytes in row-major order."""
        found: Bytes = np.empty(prod(sizes) * itemsize, dtype=np.uint8)
        runs = reduce((*sizes, itemsize), (*strides, 1), (*_row_major(sizes, itemsize), 1))
        self.copy(path, base, runs, found, 0)
        return found

    def copy(self, path: Place, base: int, runs: list[Run], out: Bytes, start: int) -> None:
        """Copy a reduced box whose first byte is at `base` of the file and at `start` of `out`."""
        *outer, run = runs
        if not outer:
            self.read(path, base, out[start : start + run.n])
            return
        span = sum((r.n - 1) * r.source for r in runs) + 1
        if run.n >= LONG_RUN:
            for source, target in _positions(outer):
                at = start + target
                self.read(path, base + source, out[at : at + run.n])
        elif span <= SCRATCH:
            self.read(path, base, self.scratch[:span])
            _spread(self.scratch, runs, out, start)
        else:
            self._in_parts(path, base, runs, out, start)

    def _in_parts(self, path: Place, base: int, runs: list[Run], out: Bytes, start: int) -> None:
        """Cut the axis with the longest reach in the source until the span fits the scratch buffer."""
        i = max(range(len(runs)), key=lambda j: (runs[j].n > 1, runs[j].source))
        axis = runs[i]
        half = axis.n // 2
        for first, n in ((0, half), (half, axis.n - half)):
            part = [*runs[:i], Run(n, axis.source, axis.target), *runs[i + 1 :]]
            self.copy(path, base + first * axis.source, part, out, start + first * axis.target)


def reduce(sizes: Shape, source: Shape, target: Shape) -> list[Run]:
    """The same box with as few axes as possible, longest target stride first; in bytes, last axis contiguous."""
    axes = sorted(
        (Run(n, s, t) for n, s, t in zip(sizes, source, target, strict=True) if n > 1),
        key=lambda r: -r.target,
    )
    merged: list[Run] = []
    for axis in axes:
        last = merged[-1] if merged else None
        if last and last.source == axis.n * axis.source and last.target == axis.n * axis.target:
            merged[-1] = Run(last.n * axis.n, axis.source, axis.target)
        else:
            merged.append(axis)
    if not merged or (merged[-1].source, merged[-1].target) != (1, 1):
        merged.append(Run(1, 1, 1))
    return merged


def _positions(outer: list[Run]) -> Iterator[tuple[int, int]]:
    for index in product(*(range(r.n) for r in outer)):
        yield (
            sum(i * r.source for i, r in zip(index, outer, strict=True)),
            sum(i * r.target for i, r in zip(index, outer, strict=True)),
        )


def _spread(scratch: Bytes, runs: list[Run], out: Bytes, start: int) -> None:
    """Strided copy inside memory, in the widest words that all sizes and strides allow."""
    *outer, run = runs
    numbers = [start, run.n, *(r.source for r in outer), *(r.target for r in outer)]
    width = next(w for w in (8, 4, 2, 1) if all(v % w == 0 for v in numbers) and out.ctypes.data % w == 0)
    shape = (*(r.n for r in outer), run.n // width)
    words = np.dtype(f"u{width}")
    source = np.ndarray(shape, words, scratch.data, 0, (*(r.source for r in outer), width))
    target = np.ndarray(shape, words, out.data, start, (*(r.target for r in outer), width))
    target[...] = source


def copy_bytes(reader: Reader, piece: Piece, out: Bytes, *, lo: int, hi: int) -> None:
    """Copy the part of `piece` that falls into bytes [lo, hi) of the target chunk; `out[0]` is byte `lo`."""
    n = piece.dtype.itemsize
    sizes = (*piece.sizes, n)
    source = (*piece.source, 1)
    target = (*(t * n for t in piece.target), 1)
    for origin, box in clip(sizes, target, piece.start * n, lo, hi):
        at = piece.start * n + _dot(origin, target)
        runs = reduce(box, source, target)
        reader.copy(piece.path, piece.base + _dot(origin, source), runs, out, at - lo)


def add_values(reader: Reader, piece: Piece | CodedPiece, out: npt.NDArray[np.float64], *, lo: int, hi: int) -> None:
    """Add the values of `piece` to elements [lo, hi) of the target chunk (float64: sums of a few floats are exact)."""
    for at, sizes, values in _boxes(reader, piece, lo, hi, "float64"):
        view = np.ndarray(sizes, out.dtype, out.data, (at - lo) * 8, tuple(s * 8 for s in piece.target))
        view += values.view(np.float64).reshape(sizes)


def cast_values(reader: Reader, piece: Piece | CodedPiece, out: Bytes, *, lo: int, hi: int, to: DType) -> None:
    """Write elements [lo, hi) of the target chunk as `to`; `out[0]` is the first byte of element `lo`."""
    n = to.itemsize
    words = np.dtype(f"V{n}")
    for at, sizes, values in _boxes(reader, piece, lo, hi, to.torch_name):
        view = np.ndarray(sizes, words, out.data, (at - lo) * n, tuple(s * n for s in piece.target))
        view[...] = values.view(words).reshape(sizes)


Values = tuple[int, Shape, npt.NDArray[Any]]  # first target element, sizes, converted values in row-major order


def _boxes(reader: Reader, piece: Piece | CodedPiece, lo: int, hi: int, to: str) -> Iterator[Values]:
    """The part of a piece that falls into elements [lo, hi) of the target chunk, as values of torch type `to`."""
    for origin, box in clip(piece.sizes, piece.target, piece.start, lo, hi):
        at = piece.start + _dot(origin, piece.target)
        if isinstance(piece, CodedPiece):
            yield from _decoded(reader, piece, origin, box, at, to)
            continue
        dense = reader.dense(
            piece.path, piece.base + _dot(origin, piece.source), box, piece.source, piece.dtype.itemsize
        )
        yield at, box, cast(dense, piece.dtype, to)


def _decoded(reader: Reader, piece: CodedPiece, origin: Shape, box: Shape, at: int, to: str) -> Iterator[Values]:
    """The same from codes, a strip at a time."""
    side = piece.source.moved(origin)
    for offset, sizes in strips(piece.tensor, side, box):
        values = rounded(decode(reader, piece.tensor, side.moved(offset), sizes), to)
        yield at + _dot(offset, piece.target), sizes, values


def _row_major(sizes: Shape, itemsize: int) -> Shape:
    strides: list[int] = []
    step = itemsize
    for n in reversed(sizes):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _dot(a: Shape, b: Shape) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))
