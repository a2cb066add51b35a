"""Compares stored numbers window by window: equal bytes cost one comparison, differences are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtp_convert.containers.base import StoredTensor
from mtp_convert.containers.torch_zip import contiguous
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import FLOATS, DType
from mtp_convert.engine.files import Extent
from mtp_convert.engine.gather import Bytes, Reader, copy_bytes
from mtp_convert.engine.pieces import Piece

ELEMENTS = 1 << 20  # per window


@dataclass(frozen=True, slots=True)
class StoredExtent:
    """A whole stored tensor in row-major order, whatever its chunks."""

    tensor: StoredTensor

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.tensor.nbytes

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.tensor.dtype

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Copy bytes [lo, hi) of the tensor into `out`."""
        strides = contiguous(self.tensor.shape)
        n = self.dtype.itemsize
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
    count, first, largest, squares = 0, -1, 0.0, np.zeros(2)
    for at in range(0, total, ELEMENTS):
        n = min(ELEMENTS, total - at)
        x, y = _window(a, reader, at, n), _window(b, reader, at, n)
        if a.dtype != b.dtype or not np.array_equal(x, y):
            fx, fy = _float64(x, a.dtype), _float64(y, b.dtype)
            if a.dtype == b.dtype:
                size = a.dtype.itemsize
                unequal = np.flatnonzero((x.reshape(n, size) != y.reshape(n, size)).any(axis=1))
            else:
                unequal = np.flatnonzero(fx != fy)
            if len(unequal):
                first = at + int(unequal[0]) if first < 0 else first
                count += len(unequal)
                with np.errstate(invalid="ignore"):
                    gap = np.abs(fx[unequal] - fy[unequal])
                largest = max(largest, float(np.nan_to_num(gap, nan=np.inf).max()))
            squares += np.array([np.square(fx).sum(), np.square(fy).sum()])
        if progress:
            progress(len(x))
    return Difference(count, first, largest, (float(squares[0] ** 0.5), float(squares[1] ** 0.5))) if count else None


def _window(extent: TypedExtent, reader: Reader, at: int, n: int) -> Bytes:
    size = extent.dtype.itemsize
    out: Bytes = np.empty(n * size, dtype=np.uint8)
    extent.fill(reader, out, at * size, (at + n) * size)
    return out


def _float64(raw: Bytes, dtype: DType) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if dtype.name in FLOATS or dtype.name.startswith("F8"):
        return cast(raw, dtype, "float64").view(np.float64)
    return raw.view(np.dtype(dtype.torch_name)).astype(np.float64)
