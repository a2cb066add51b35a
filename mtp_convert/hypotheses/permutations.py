"""Whether the rows of one matrix are those of another in another order, and in which one.

Orders that programs make (halves swapped, halves interleaved, a dimension read in two parts that were exchanged, ...)
are tried one by one, which also works where values were rounded on the way. Any other order is found by looking every
row up. Matrices [R, C] hold the dimension in question as rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtp_convert.encodings.minifloat import bfloat16
from mtp_convert.hypotheses.agreement import Agrees, Fit, Values

Order = npt.NDArray[np.int64]
KEY = 32  # columns at least by which a row is looked up, if there are as many
PROBES = 16  # rows that an order is tried on first
BFLOAT16, FLOAT16 = 2.0**-8, 2.0**-11  # unit roundoff


@dataclass(frozen=True, slots=True)
class Moved:
    """B's row i is A's row order[i]. what: the order in words, with `rows` for whatever the rows are."""

    what: str
    detail: str
    fit: Fit


def find(a: Values, b: Values, agrees: Agrees, roundoff: float) -> Moved | None:
    """The order of A's rows that makes B; None where there is none.

    Args:
        agrees: whether two matrices hold the same values.
        roundoff: unit roundoff of the coarser type of both.
    """
    count = len(a)
    if count < 2:
        return None
    probes = np.unique(np.linspace(0, count - 1, PROBES).astype(np.int64))
    for what, order in known_orders(count):
        if agrees(a[order[probes]], b[probes]) and (fit := agrees(a[order], b)):
            return Moved(what, "", fit)
    if (looked_up := lookup(a, b, roundoff)) is None:
        return None
    fit = agrees(a[looked_up], b)
    return Moved(*_in_words(looked_up), fit) if fit else None


def known_orders(count: int) -> Iterator[tuple[str, Order]]:
    """Orders of `count` rows with a name, the simplest first; none of them leaves all rows in place."""
    rows = np.arange(count, dtype=np.int64)
    if count % 2 == 0:
        yield "halves of the rows swapped", np.roll(rows, count // 2)
    if count > 2:
        yield "order of the rows reversed", rows[::-1]
        yield "rows shifted by +1", np.roll(rows, 1)
        yield "rows shifted by -1", np.roll(rows, -1)
    for size in range(4, count + 1, 2):  # two rows to a half at least: one is a swap of neighbours
        if count % size == 0:
            blocks = rows.reshape(-1, 2, size // 2)
            where = "the rows" if size == count else f"every block of {size} rows"
            if size < count:
                yield f"halves of {where} swapped", blocks[:, ::-1].reshape(-1)
            yield f"halves of {where} interleaved", blocks.swapaxes(1, 2).reshape(-1)
            pairs = rows.reshape(-1, size // 2, 2).swapaxes(1, 2).reshape(-1)
            if size > 4:
                yield f"pairs of {where} taken apart into halves", pairs
    if count % 2 == 0 and count > 2:
        yield "neighbouring rows swapped", rows.reshape(-1, 2)[:, ::-1].reshape(-1)
    yield from _exchanged(rows)


def _exchanged(rows: Order) -> Iterator[tuple[str, Order]]:
    """Rows counted in two parts, within equal blocks, and the parts exchanged: heads by group, groups by head, ..."""
    count = len(rows)
    for size in (n for n in range(9, count + 1) if count % n == 0):
        for outer in (n for n in range(3, size // 2) if size % n == 0):
            inner = size // outer
            where = "the rows" if size == count else f"every block of {size} rows"
            order = rows.reshape(-1, outer, inner).swapaxes(1, 2).reshape(-1)
            yield f"{where} read as {outer} x {inner} and transposed", order


def lookup(a: Values, b: Values, roundoff: float) -> Order | None:
    """For every row of B the row of A with the same values, each used once and its own place first; None without.

    Values are compared as the coarser type of both holds them.
    """
    left, right = _keys(a, roundoff), _keys(b, roundoff)
    free: dict[bytes, list[int]] = {}
    order = np.full(len(a), -1, dtype=np.int64)
    for i in range(len(a) - 1, -1, -1):
        if left[i] == right[i]:
            order[i] = i
        else:
            free.setdefault(left[i], []).append(i)
    for i in np.flatnonzero(order < 0).tolist():
        rows = free.get(right[i])
        if not rows:
            return None
        order[i] = rows.pop()
    return order


def among(rows: Values, others: Values, roundoff: float) -> Order | None:
    """For every row the index of one of `others` with the same values; None where one has none, or all look alike."""
    where = {key: i for i, key in enumerate(_keys(others, roundoff))}
    keys = _keys(rows, roundoff)
    if len(set(keys)) < 2 or not all(key in where for key in keys):
        return None
    return np.array([where[key] for key in keys], dtype=np.int64)


def _keys(values: Values, roundoff: float) -> list[bytes]:
    """Some columns of every row as the coarser type of both sides holds them."""
    values = values[:, :: max(1, values.shape[1] // KEY)]
    if values.dtype == np.float32 and roundoff >= FLOAT16:
        with np.errstate(over="ignore"):
            values = bfloat16(np.ascontiguousarray(values)) if roundoff >= BFLOAT16 else values.astype(np.float16)
    values = np.ascontiguousarray(values)
    width = values.shape[1] * values.itemsize
    raw = values.tobytes()
    return [raw[i : i + width] for i in range(0, len(raw), width)]


def _in_words(order: Order) -> tuple[str, str]:
    """An order without a name: in the largest blocks that it moves as a whole."""
    count = len(order)
    size = next(n for n in range(count // 2, 0, -1) if count % n == 0 and _moves_blocks(order, n))
    blocks = order[::size] // size
    moved = np.flatnonzero(blocks != np.arange(len(blocks)))
    what = "rows permuted" if size == 1 else f"blocks of {size} rows permuted"
    unit = "row" if size == 1 else "block"
    if len(moved) == 2:
        return what, f"{unit}s {moved[0]} and {moved[1]} exchanged"
    first = int(moved[0])
    return what, f"{len(moved)} of {len(blocks)} {unit}s moved; {unit} {first} holds A's {unit} {blocks[first]}"


def _moves_blocks(order: Order, size: int) -> bool:
    blocks = order.reshape(-1, size)
    return bool((blocks[:, 0] % size == 0).all() and (np.diff(blocks, axis=1) == 1).all())
