"""Finds a param's values under another name: params exchanged, layers or experts shifted by one, a stale copy.

A short run of values from the middle of every equally shaped param is the key to look it up by; what is found is then
compared as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from threading import Lock

import numpy as np

from mtp_convert.encodings.minifloat import bfloat16
from mtp_convert.engine.compare import compare
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.hypotheses.agreement import Fit, agree
from mtp_convert.hypotheses.explain import Guess
from mtp_convert.hypotheses.permutations import among
from mtp_convert.mapping.views import Shape
from mtp_convert.param_values import alike, columns, middle, rounding, sample, shapes

KEY = 256  # values
MOST_TRIED = 4  # equal keys that are compared as a whole
MIXED = "rows of params beside it, as of a fused tensor that was read in another way"

Extents = Mapping[str, TensorExtent]


class Elsewhere:
    """The params of two checkpoints, to be looked up by their values. Safe to use from several threads."""

    def __init__(self, a: Extents, b: Extents) -> None:
        self._sides = {"A": a, "B": b}
        self._shapes = {side: shapes(extents) for side, extents in self._sides.items()}
        self._index: dict[tuple[str, Shape], dict[bytes, list[str]]] = {}
        self._lock = Lock()

    def find(self, param: str, reader: Reader) -> Guess | None:
        """Which other param of A has what B has here, or the other way round; None where no other has."""
        for here, there in (("B", "A"), ("A", "B")):
            found = self._holders(here, param, there, reader)
            if not found:
                continue
            other, fit = min(found, key=lambda f: _distance(param, f[0]))
            exchanged = any(n == param for n, _ in self._holders(here, other, there, reader))
            what, detail = related(param, other, exchanged=exchanged, here=here, there=there)
            more = f" (and in {len(found) - 1} others)" if len(found) > 1 else ""
            return Guess(what, detail + more, fit)
        return None

    def mixed(self, param: str, reader: Reader) -> Guess | None:
        """Whether B's rows are those of A's params beside this one, as when a fused tensor was read in another way."""
        a, extent = self._sides["A"], self._sides["B"][param]
        if len(extent.sizes) < 2:
            return None
        names = [n for n in self._neighbours(param) if n in a and a[n].sizes[1:] == extent.sizes[1:]]
        pairs = [alike(a[n], extent) for n in names]
        mine, *others = columns([extent, *(x for x, _ in pairs)], reader)
        rows = among(mine, np.concatenate(others), rounding(a[param], extent).relative)
        if rows is None:
            return None
        owners = [n for n, v in zip(names, others, strict=True) for _ in range(len(v))]
        first = next((i for i, row in enumerate(rows.tolist()) if owners[row] != param), 0)
        owner = owners[rows[first]]
        roles = ", ".join(sorted({owners[row].rpartition(".")[2] for row in rows.tolist()}))
        detail = f"row {first} is row {rows[first] - owners.index(owner)} of A's {owner}; rows of {roles}"
        return Guess(MIXED, detail, "exact", sampled=mine.size < prod(extent.sizes))

    def _neighbours(self, param: str) -> list[str]:
        """The params of the same block, and those that share a tensor with this one on either side."""
        found = dict.fromkeys(n for side in self._sides.values() for n in _in_one_tensor(side[param]))
        block = param.rpartition(".")[0]
        return list(found | dict.fromkeys(n for n in self._sides["A"] if n.rpartition(".")[0] == block))

    def _holders(self, here: str, param: str, there: str, reader: Reader) -> list[tuple[str, Fit]]:
        """The params of the one side, this one aside, that hold what the other side has under this name."""
        extent = self._sides[here].get(param)
        if extent is None or (key := _key(extent, reader)) is None:
            return []
        names = [n for n in self._by_key(there, extent.sizes, reader).get(key, ()) if n != param]
        names = sorted(names, key=lambda n: _distance(param, n))[:MOST_TRIED]
        fits = ((n, _fit(extent, self._sides[there][n], reader)) for n in names)
        return [(n, fit) for n, fit in fits if fit]

    def _by_key(self, side: str, shape: Shape, reader: Reader) -> Mapping[bytes, list[str]]:
        with self._lock:
            if (side, shape) not in self._index:
                index: dict[bytes, list[str]] = {}
                for name in self._shapes[side].get(shape, ()):
                    if (key := _key(self._sides[side][name], reader)) is not None:
                        index.setdefault(key, []).append(name)
                self._index[side, shape] = index
            return self._index[side, shape]


def _in_one_tensor(extent: TensorExtent) -> Iterator[str]:
    """The params that share a tensor with this one; of stacked matrices those that share a matrix."""
    home, view = extent.step.source.home[extent.step.binding.parts[0].param]
    index = view.start[: home.stacked]
    yield from (p.param for p in home.parts if p.view.start[: home.stacked] == index)


def _key(extent: TensorExtent, reader: Reader) -> bytes | None:
    """Values as bfloat16 holds them, which a cast leaves alone; None where they are all the same and tell nothing."""
    with np.errstate(over="ignore"):
        values = middle(extent, reader, KEY).astype(np.float32)
    return bfloat16(values).tobytes() if bool((values != values[:1]).any()) else None


def _fit(x: TensorExtent, y: TensorExtent, reader: Reader) -> Fit | None:
    a, b = alike(x, y)
    if (d := compare(a, b, reader)) is None:
        return "exact"
    with np.errstate(all="ignore"):
        both = sample(a, b, reader, d.first)
        return agree(*both.rows, rounding=rounding(x, y)) and agree(*both.columns, rounding=rounding(x, y))


def _distance(a: str, b: str) -> tuple[int, int, str]:
    """How unlike two names are: words that differ, then how far their numbers are apart."""
    x, y = a.split("."), b.split(".")
    if len(x) != len(y):
        return len(x) + len(y), 0, b
    pairs = [(p, q) for p, q in zip(x, y, strict=True) if p != q]
    return len(pairs), sum(abs(int(p) - int(q)) for p, q in pairs if p.isdecimal() and q.isdecimal()), b


def related(param: str, other: str, *, exchanged: bool, here: str = "B", there: str = "A") -> tuple[str, str]:
    """In words, what it means that `here` holds under one name what `there` holds under another; and the particulars.

    The words name roles (`gate and up exchanged`), the particulars the params.
    """
    x, y = param.split("."), other.split(".")
    at = [i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q] if len(x) == len(y) else []
    detail = f"{there}'s {other}"
    if at and all(x[i].isdecimal() and y[i].isdecimal() for i in at):
        counted = " and ".join(dict.fromkeys(x[i - 1] if i else "numbers" for i in at))
        if exchanged:
            return f"{counted} exchanged", f"with {detail}"
        by = int(y[at[0]]) - int(x[at[0]])
        shifted = f" by one: {here}'s i is {there}'s i{by:+d}" if len(at) == 1 and abs(by) == 1 else ""
        return f"{counted} shifted{shifted}", f"it is {detail}"
    first, second = (_role(words, at) for words in (x, y))
    if exchanged:
        return " and ".join(sorted((first, second))) + " exchanged", f"with {detail}"
    return f"{here}'s {first} holds {there}'s {second}", f"it is {detail}"


def _role(words: list[str], at: list[int]) -> str:
    """The words that differ, or all of them, without numbers."""
    return ".".join("#" if words[i].isdecimal() else words[i] for i in at or range(len(words)))
