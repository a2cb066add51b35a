"""What may have happened to a param between two checkpoints: hypotheses, each tested on the values themselves.

`explain` takes the values of both sides and returns the first hypothesis that makes B of A, to the last bit or to the
rounding of the types they are stored in. Nothing here reads files; only numpy is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, log2
from typing import Literal

import numpy as np

from mtp_convert.encodings.minifloat import E4M3, bfloat16, from_bfloat16
from mtp_convert.hypotheses import permutations, scaling
from mtp_convert.hypotheses.agreement import EXACT, Agrees, Both, Fit, Rounding, Values, agree, beyond, differing

Map = Callable[[Values], Values]
PROBES = 256  # elements that a hypothesis is tried on first
SOME = 1 << 18  # elements that a correlation is taken over
FEW = 8  # elements
ENOUGH = 4  # elements from which on a constant that was fitted to them is evidence
FRACTIONS = {"F64": (52, 11), "F32": (23, 8), "F16": (10, 5), "BF16": (7, 8)}  # type -> bits of fraction and exponent


@dataclass(frozen=True, slots=True)
class Guess:
    """What may have happened to a param.

    what: in words that hold for other params too; detail: what is special to this one. fit: B follows from A to the
    last bit ("exact"), to the rounding of the stored types, or the guess is no computation (""). sampled: the param is
    large, and was tested on some of its rows and columns.
    """

    what: str
    detail: str = ""
    fit: Literal["exact", "rounding", ""] = ""
    sampled: bool = False

    def text(self) -> str:
        """For people: `halves of the rows swapped (to the bit; from a sample): detail`."""
        how = {"exact": ["to the bit"], "rounding": ["to rounding"], "": []}[self.fit]
        how += ["from a sample"] if self.sampled else []
        return self.what + (f" ({'; '.join(how)})" if how else "") + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Sample:
    """Values (A, B) of one param as matrices, dimension 0 x all others.

    rows [r, C]: some whole rows; columns [R, c]: some whole columns. Of a small param both are all of it.
    """

    rows: Both
    columns: Both

    @staticmethod
    def whole(a: Values, b: Values) -> Sample:
        """All values; a vector is one column."""
        both = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        return Sample(both, both)

    @property
    def complete(self) -> bool:
        """Whether it holds all values."""
        return self.rows is self.columns


def explain(sample: Sample, rounding: Rounding, *, share: float = 1.0) -> Guess | None:
    """The first hypothesis that explains B by A; None when none does.

    Args:
        rounding: of the coarser of the two stored types, or of both together.
        share: of all elements of the param, those that differ. Where they gather in a sample, only part of the param
            can have changed.
    """
    with np.errstate(all="ignore"):
        agrees = partial(agree, rounding=rounding)
        gathered = not sample.complete and share < float(differing(*sample.rows).mean()) / 2
        hypotheses = (
            (_part,)
            if gathered
            else (_same, _broken, _constant, _elementwise, _moved, _few, _part, _scaled, _unrelated)
        )
        for hypothesis in hypotheses:
            if (guess := hypothesis(sample, agrees, rounding)) is not None:
                return replace(guess, sampled=not sample.complete)
    return None


def _probes(values: Values) -> Values:
    """Some elements from all over an array."""
    flat = values.reshape(-1)
    return flat[:: max(1, len(flat) // PROBES)]


def _same(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """Bits that are no values: the sign of a zero, the payload of a NaN."""
    if differing(*map(_probes, sample.rows)).any():
        return None
    equal = not any(differing(*both).any() for both in (sample.rows, sample.columns))
    return Guess("equal values in other bits, as -0 and 0") if equal and sample.complete else None


def _tried(change: Map, both: Both, agrees: Agrees, scale: float = 0.0) -> Fit | None:
    """Whether an elementwise change of A makes B; a few elements decide most cases."""
    a, b = both[0].reshape(-1), both[1].reshape(-1)
    if agrees(change(_probes(a)).astype(a.dtype), _probes(b), scale=scale) is None:
        return None
    return agrees(change(a).astype(a.dtype), b, scale=scale)


def _broken(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """One side has no numbers where they differ."""
    a, b = map(_probes, sample.rows)
    if (differing(a, b) & np.isfinite(a) & np.isfinite(b)).any():
        return None
    differs = differing(*sample.rows)
    for side, values in zip("AB", sample.rows, strict=True):
        if differs.any() and not np.isfinite(values[differs]).any():
            return Guess(f"{side} is not finite where they differ", f"{int(np.isnan(values).sum())} NaN")
    return None


def _constant(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """One side is the same number everywhere."""
    a, b = (_only_value(side) for side in sample.rows)
    if b is None and a is None:
        return None
    if b is None:
        return Guess("A is zero, B is not" if a == 0 else f"A is {a:g} everywhere, B is not")
    now = "zeroed" if b == 0 else f"{b:g} everywhere"
    if a is None:
        return Guess(f"{now} in B", fit="exact")
    if abs(b - a) == 1:
        return Guess(f"{a:g} everywhere became {b:g}", "an offset of norms that count from 0 or from 1, or a new start")
    return Guess(f"{a:g} everywhere became {b:g}", fit="exact")


def _only_value(values: Values) -> float | None:
    first = float(values.flat[0])
    if (_probes(values) != first).any():
        return None
    return first if bool((values == first).all()) and values.size > 1 else None


def _elementwise(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """The same change of every element."""
    a, b = sample.rows
    exact = partial(agree, rounding=EXACT)
    for name, cast in CASTS.items():
        if _tried(cast, (a, b), exact):
            return Guess(f"cast: B is A rounded to {name}", fit="exact")
        if _tried(cast, (b, a), exact):
            return Guess(f"cast: A is B rounded to {name}", fit="exact")
    if _tried(np.positive, sample.rows, agrees):
        return Guess("rounding: B is A to the precision of the stored types", fit="rounding")
    for what, change, scale in _changes(a, b):
        if fit := _tried(change, sample.rows, agrees, scale):
            return Guess(what, fit=fit)
    return None


def _changes(a: Values, b: Values) -> Iterator[tuple[str, Map, float]]:
    """Elementwise changes: in words, as a function, and the magnitude of what is added."""
    yield "sign flipped", np.negative, 0.0
    if a.size < 2:
        return
    offset = float(np.nanmedian(_probes(b).astype(np.float64) - _probes(a)))
    if not isfinite(offset):
        return
    if abs(near := round(offset)) == 1:
        yield f"offset {near:+d}, as of norms that count from 0 or from 1", partial(np.add, float(near)), 1.0
    yield from _factors(a, b)
    if a.size >= ENOUGH and offset and not _nearly_constant(_probes(a)):
        yield f"offset {offset:+.3g}", partial(np.add, offset), abs(offset)


def _nearly_constant(a: Values) -> bool:
    """Too even to tell an offset from a factor."""
    return float(np.ptp(a)) <= 1e-3 * float(np.abs(a).max())


def _factors(a: Values, b: Values) -> Iterator[tuple[str, Map, float]]:
    """The one factor that fits best: as a power of two, and as it is."""
    x, y = _probes(a), _probes(b)
    if not np.isfinite(x).all():
        return
    at = int(np.abs(x).argmax())
    factor = float(y[at]) / float(x[at]) if x[at] else 0.0
    if not isfinite(factor) or factor in (0.0, 1.0, -1.0):
        return
    power, sign = round(log2(abs(factor))), "-" if factor < 0 else ""
    if power:
        yield f"factor {sign}2^{power}", partial(np.multiply, np.copysign(2.0**power, factor)), 0.0
    if a.size >= ENOUGH:
        factor = _fitted(x, y)
        yield f"factor {factor:.6g}", partial(np.multiply, factor), 0.0


def _fitted(x: Values, y: Values) -> float:
    """The factor with the least squares."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(x @ y) / float(x @ x)


def _to_bfloat16(x: Values) -> Values:
    return from_bfloat16(bfloat16(np.ascontiguousarray(x, dtype=np.float32)))


def _to_float16(x: Values) -> Values:
    return x.astype(np.float16)


def _to_e4m3(x: Values) -> Values:
    return E4M3.table[E4M3.codes(np.ascontiguousarray(x, dtype=np.float32))]


def _to_float32(x: Values) -> Values:
    return x.astype(np.float32)


CASTS: dict[str, Map] = {"F32": _to_float32, "F16": _to_float16, "BF16": _to_bfloat16, "F8_E4M3": _to_e4m3}


def _moved(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """The same values at other places."""
    if fit := _transposed(sample, agrees):
        return Guess("transposed", fit=fit)
    if (found := permutations.find(*sample.columns, agrees, rounding.relative)) is not None:
        return Guess(found.what, found.detail, found.fit)
    a, b = sample.rows
    if a.shape[1] > 1 and (found := permutations.find(a.T, b.T, agrees, rounding.relative)) is not None:
        return Guess(_of_columns(found.what), _of_columns(found.detail), found.fit)
    return None


def _of_columns(text: str) -> str:
    return text.replace("row", "column")


def _transposed(sample: Sample, agrees: Agrees) -> Fit | None:
    """A square matrix transposed, or the values of a transpose read in the old shape."""
    (a, _), (_, b) = sample.rows, sample.columns
    if len(sample.columns[0]) == a.shape[1]:  # square: the rows of one are columns of the other
        n = min(len(a), b.shape[1])
        if n < 2 or not agrees(a[:n, :PROBES].T, b[:PROBES, :n]):
            return None
        return agrees(a[:n].T, b[:, :n])
    if not sample.complete or min(a.shape) < 2:
        return None
    x, y, n = a.reshape(-1), b.reshape(-1), min(PROBES, len(a))
    if agrees(a[:n, 0], y[:n]) and (fit := agrees(a.T.reshape(a.shape), b)):
        return fit
    return agrees(a.reshape(a.shape[::-1]).T, b) if agrees(x[:n], b[:n, 0]) else None


def _scaled(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """Scales left out, brought in twice, or used on the way through small codes."""
    a, b = sample.rows
    if found := scaling.block_factor(a, b, rounding):
        return Guess(*found, "rounding")
    if format_ := scaling.coded(a, b):
        return Guess(f"cast: B is A through {format_}", fit="rounding")
    if format_ := scaling.coded(b, a):
        return Guess(f"cast: A is B through {format_}", fit="rounding")
    return None


def _few(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """Single elements."""
    a, b = sample.rows
    count = int(np.count_nonzero(differing(a, b)))
    if sample.complete and count <= FEW and count * 8 <= a.size:
        return Guess("one element changed" if count == 1 else "a few elements changed")
    return None


def _part(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """All differences lie in one run of rows or columns, at most half of all."""
    for (a, b), axis, name in ((sample.columns, 0, "rows"), (sample.rows, 1, "columns")):
        ends = (np.take(a, (0, -1), axis), np.take(b, (0, -1), axis))
        if beyond(*ends, rounding=rounding).any(axis=1 - axis).all():
            continue
        touched = np.flatnonzero(beyond(a, b, rounding=rounding).any(axis=1 - axis))
        if not len(touched) or a.shape[axis] < 4:
            continue
        lo, hi = int(touched[0]), int(touched[-1]) + 1
        if 2 * (hi - lo) > a.shape[axis] or len(touched) * 2 < hi - lo:
            continue
        cut = slice(lo, hi) if axis == 0 else (slice(None), slice(lo, hi))
        both = a[cut], b[cut]
        inner = Sample(both, both)
        for hypothesis in (_constant, _elementwise, _scaled, _unrelated):
            if (guess := hypothesis(inner, agrees, rounding)) is not None:
                return Guess(f"only in a run of {name}: {guess.what}", f"{name} {lo} to {hi - 1}", guess.fit)
        return Guess(f"differs in one run of {name} alone", f"{name} {lo} to {hi - 1} of {a.shape[axis]}")
    return None


def _unrelated(sample: Sample, agrees: Agrees, rounding: Rounding) -> Guess | None:
    """Two draws of one distribution: no correlation, about the same mean and the same spread."""
    a, b = (side.reshape(-1)[:: max(1, side.size // SOME)].astype(np.float64) for side in sample.rows)
    if len(a) < 64 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    spread = float(a.std()), float(b.std())
    if min(spread) == 0 or not 0.8 < spread[0] / spread[1] < 1.25 or abs(a.mean() - b.mean()) > min(spread) / 4:
        return None
    correlation = float(((a - a.mean()) * (b - b.mean())).mean()) / (spread[0] * spread[1])
    if abs(correlation) > 4 / len(a) ** 0.5:
        return None
    return Guess("unrelated values of the same spread, as of a new initialisation", f"correlation {correlation:+.3f}")


def flipped(bits: Sequence[tuple[int, int]], dtype: str) -> Guess | None:
    """One bit in each of some elements, given as their bits on both sides; None for other changes.

    Args:
        dtype: element type of both sides.
    """
    changed = [x ^ y for x, y in bits]
    if not changed or any(c.bit_count() != 1 for c in changed):
        return None
    places = sorted({c.bit_length() - 1 for c in changed})
    named = ", ".join(f"{p} ({_bit_name(p, dtype)})" for p in places)
    what = "one bit flipped" if len(bits) == 1 else "one bit flipped in each of a few elements"
    return Guess(what, f"bit {named}" if len(places) == 1 else f"bits {named}", "exact")


def _bit_name(bit: int, dtype: str) -> str:
    fraction, exponent = FRACTIONS.get(dtype, (0, 0))
    if not fraction:
        return "counted from the lowest"
    return "fraction" if bit < fraction else "exponent" if bit < fraction + exponent else "sign"
