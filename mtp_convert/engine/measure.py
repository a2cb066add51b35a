"""Figures about two runs of stored elements: how many differ, where and by how much. Sums are taken in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import FLOATS, DType
from mtp_convert.encodings.minifloat import E4M3, from_bfloat16
from mtp_convert.engine.gather import Bytes

Floats = npt.NDArray[np.float64]
PART = 1 << 16  # elements that are measured at a time, so that their values stay in the cache
MOST_EXAMPLES = 8  # differing elements whose bits are kept


class Example(NamedTuple):
    """A differing element of two tensors of one type: its flat index, and its bits on both sides."""

    at: int
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What some windows showed; the tallies of windows in their order add up. Fields as in `Difference`."""

    count: int = 0
    first: int = -1
    values: tuple[float, float] = (0.0, 0.0)
    max_abs: float = 0.0
    largest: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    dot: float = 0.0
    examples: tuple[Example, ...] = ()

    def __add__(self, later: Tally) -> Tally:
        earliest = self if self.first >= 0 else later
        return Tally(
            self.count + later.count,
            earliest.first,
            earliest.values,
            max(self.max_abs, later.max_abs),
            max(self.largest, later.largest),
            (self.squares[0] + later.squares[0], self.squares[1] + later.squares[1]),
            self.dot + later.dot,
            (self.examples + later.examples)[:MOST_EXAMPLES],
        )


def same(x: Bytes, a: DType, y: Bytes, b: DType) -> bool:
    """Whether two windows hold equal bits, the narrower type as the wider one. False may still mean equal values."""
    if a == b:
        whole = len(x) & ~7
        return np.array_equal(x[:whole].view(np.uint64), y[:whole].view(np.uint64)) and np.array_equal(
            x[whole:], y[whole:]
        )
    if a.itemsize > b.itemsize:
        x, a, y, b = y, b, x, a
    if not {a.name, b.name} <= FLOATS or a.itemsize == b.itemsize:
        return False
    return same(numbers(x, a).astype(b.torch_name, copy=False).view(np.uint8), b, y, b)


def measure(at: int, x: Bytes, a: DType, y: Bytes, b: DType) -> Tally:
    """Measure the window that starts at element `at`, in parts that stay in the cache."""
    found = Tally()
    for lo in range(0, len(x) // a.itemsize, PART):
        part_x, part_y = (raw[lo * t.itemsize : (lo + PART) * t.itemsize] for raw, t in ((x, a), (y, b)))
        found += _measure_part(at + lo, part_x, a, part_y, b)
    return found


def _measure_part(at: int, x: Bytes, a: DType, y: Bytes, b: DType) -> Tally:
    fx, fy = float64(x, a), float64(y, b)
    if a == b:
        word = np.dtype(f"u{a.itemsize}")
        differs = x.view(word) != y.view(word)
    else:
        differs = (fx != fy) & ~(np.isnan(fx) & np.isnan(fy))
    count = int(np.count_nonzero(differs))
    if not count:
        return _weigh(fx, fy)
    few = np.flatnonzero(differs)[:MOST_EXAMPLES]
    examples = tuple(Example(at + i, _bits(x, i, a), _bits(y, i, a)) for i in few.tolist() if a == b)
    first = int(few[0])
    found = Tally(count, at + first, (float(fx[first]), float(fy[first])), _largest_gap(fx, fy, differs))
    return replace(found, examples=examples) + _weigh(fx, fy)


def _largest_gap(fx: Floats, fy: Floats, differs: npt.NDArray[np.bool_]) -> float:
    """The largest absolute difference; what is not finite on one side is infinitely far away."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = fx - fy
        np.abs(gap, out=gap)
        largest = float(gap.max())
        if np.isnan(largest):  # equal infinities, or NaN
            largest = float(np.nan_to_num(gap[differs], nan=np.inf, posinf=np.inf).max())
    return largest


def weigh(raw: Bytes, dtype: DType) -> Tally:
    """What elements that are equal on both sides add to the norms."""
    found = Tally()
    for lo in range(0, len(raw), PART * dtype.itemsize):
        values = float64(raw[lo : lo + PART * dtype.itemsize], dtype)
        found += _weigh(values, values)
    return found


def _bits(raw: Bytes, i: int, dtype: DType) -> int:
    return int.from_bytes(raw[i * dtype.itemsize : (i + 1) * dtype.itemsize].tobytes(), "little")


def _weigh(fx: Floats, fy: Floats) -> Tally:
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.fmax.reduce(np.abs(fx), initial=0.0))
        xx, yy = _dot(fx, fx), _dot(fy, fy)
        return Tally(largest=largest, squares=(xx, yy), dot=_dot(fx, fy))


def _dot(x: Floats, y: Floats) -> float:
    """Without BLAS, whose own threads would wait for each other below those of the caller."""
    return float(np.einsum("i,i->", x, y))


def numbers(raw: Bytes, dtype: DType) -> npt.NDArray[Any]:
    """Raw elements as an array that holds their values exactly: the type itself, or float32 for what numpy has not."""
    if dtype.name == "BF16":
        return from_bfloat16(raw.view(np.uint16))
    if dtype.name.startswith("F8"):
        return E4M3.table[raw] if dtype.name == "F8_E4M3" else cast(raw, dtype, "float32").view(np.float32)
    return raw.view(np.dtype(dtype.torch_name))


def float64(raw: Bytes, dtype: DType) -> Floats:
    """The values of raw elements; of complex numbers their magnitude."""
    values = numbers(raw, dtype)
    return (np.abs(values) if np.iscomplexobj(values) else values).astype(np.float64, copy=False)
