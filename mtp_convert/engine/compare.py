"""Compares stored numbers window by window: equal bytes cost one comparison, differences are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mtp_convert.containers.base import StoredTensor
from mtp_convert.containers.torch_zip import contiguous
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import FLOATS, DType
from mtp_convert.engine.files import Extent
from mtp_convert.engine.gather import Bytes, Reader, cast_values, copy_bytes
from mtp_convert.engine.pieces import CodedPiece, Piece
from mtp_convert.mapping.views import Side

Floats = npt.NDArray[np.float64]
ELEMENTS = 1 << 20  # per window


@dataclass(frozen=True, slots=True)
class StoredExtent:
    """A stored tensor in row-major order, whatever its chunks: all of it, or its first `rows`."""

    tensor: StoredTensor
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        rows = self.tensor.shape[:1] if self.rows is None else (self.rows,)
        return prod((*rows, *self.tensor.shape[1:])) * self.dtype.itemsize

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.tensor.dtype

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Copy bytes [lo, hi) of the tensor into `out`; encoded values are decoded."""
        strides = contiguous(self.tensor.shape)
        n = self.dtype.itemsize
        if self.tensor.encoding is not None:
            whole = Side((0,) * len(strides), tuple(range(len(strides))), (1,) * len(strides))
            piece = CodedPiece(self.tensor.shape, self.tensor, whole, 0, strides)
            cast_values(reader, piece, out, lo=lo // n, hi=hi // n, to=self.dtype)
            return
        for c in self.tensor.chunks:
            start = sum(o * s for o, s in zip(c.offset, strides, strict=True))
            inner = tuple(s * n for s in contiguous(c.sizes))
            copy_bytes(
                reader,
                Piece(c.sizes, c.path, c.start, inner, start, strides, self.dtype),
                out,
                lo=lo,
                hi=hi,
            )


class TypedExtent(Extent, Protocol):
    """An extent of numbers of one element type."""

    @property
    def dtype(self) -> DType:
        """Element type."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two tensors that are not equal bit for bit.

    count: differing elements; first: flat index of the first; max_abs: largest absolute difference (float64);
    norms: Euclidean norms of both sides.
    """

    count: int
    first: int
    max_abs: float
    norms: tuple[float, float]

    def text(self) -> str:
        """For people."""
        return f"{self.count} elements differ, first at {self.first}, max difference {self.max_abs:.3g}"


def compare(
    a: TypedExtent, b: TypedExtent, reader: Reader, *, progress: Callable[[int], None] | None = None
) -> Difference | None:
    """None when both hold the same bits (or the same values, if the element types differ).

    Raises:
        ValueError: the element counts differ.
    """
    total = a.nbytes // a.dtype.itemsize
    if total != b.nbytes // b.dtype.itemsize:
        raise ValueError("different numbers of elements")
    tally = _Tally(a.dtype, b.dtype)
    equal: list[int] = []
    for at in range(0, total, ELEMENTS):
        n = min(ELEMENTS, total - at)
        x, y = _window(a, reader, at, n), _window(b, reader, at, n)
        if a.dtype == b.dtype and np.array_equal(x, y):
            equal.append(at)
        else:
            tally.add(at, x, y)
        if progress:
            progress(len(x))
    if not tally.count:
        return None
    for at in equal:  # their share of the norms was not worth its time before a difference was found
        tally.weigh(_window(a, reader, at, min(ELEMENTS, total - at)))
    return Difference(tally.count, tally.first, tally.largest, (tally.squares[0] ** 0.5, tally.squares[1] ** 0.5))


@dataclass
class _Tally:
    """What is known about the differences of two tensors so far."""

    a: DType
    b: DType
    count: int = 0
    first: int = -1
    largest: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    def add(self, at: int, x: Bytes, y: Bytes) -> None:
        """Measure the window that starts at element `at`."""
        fx, fy = _float64(x, self.a), _float64(y, self.b)
        if self.a == self.b:
            size = self.a.itemsize
            differs = (x.reshape(-1, size) != y.reshape(-1, size)).any(axis=1)
        else:
            differs = (fx != fy) & ~(np.isnan(fx) & np.isnan(fy))
        unequal = np.flatnonzero(differs)
        if len(unequal):
            self.first = at + int(unequal[0]) if self.first < 0 else self.first
            self.count += len(unequal)
            with np.errstate(invalid="ignore"):
                gap = np.abs(fx[unequal] - fy[unequal])
            self.largest = max(self.largest, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max()))
        self._weigh(fx, fy)

    def weigh(self, x: Bytes) -> None:
        """Count a window that is equal on both sides towards the norms."""
        values = _float64(x, self.a)
        self._weigh(values, values)

    def _weigh(self, fx: Floats, fy: Floats) -> None:
        with np.errstate(over="ignore"):
            self.squares = (self.squares[0] + float(fx @ fx), self.squares[1] + float(fy @ fy))


def _window(extent: TypedExtent, reader: Reader, at: int, n: int) -> Bytes:
    size = extent.dtype.itemsize
    out: Bytes = np.empty(n * size, dtype=np.uint8)
    extent.fill(reader, out, at * size, (at + n) * size)
    return out


def _float64(raw: Bytes, dtype: DType) -> Floats:
    if dtype.name in FLOATS or dtype.name.startswith("F8"):
        return cast(raw, dtype, "float64").view(np.float64)
    return raw.view(np.dtype(dtype.torch_name)).astype(np.float64)
