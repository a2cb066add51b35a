"""Tensor-level difference of two checkpoints of one family, in any two layouts: compared param by param, and explained.

Every param is compared; so is every stored copy with the other side's param. What differs is measured, and hypotheses
about what happened are tested on the values (`hypotheses`) and on the other params (`elsewhere`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.elsewhere import Elsewhere, Extents
from mtp_convert.engine.compare import Difference, Worker, compare_all, in_threads
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hypotheses.explain import Guess, explain, flipped
from mtp_convert.mapping.views import Shape
from mtp_convert.param_values import alike, copies, is_coded, params, rounding, sample
from mtp_convert.readable import Readable, strict

EXPLAINED = 4  # params of one kind that are looked into; the others follow where one of these was explained
THREADS = 2  # they compute, in up to 200 MB each
NOT_EXAMINED = Guess("", "others of its kind were not explained")


@dataclass(frozen=True)
class ParamDifference:
    """One param that differs: its names on both sides, by how much, and what may have happened.

    count, share: differing elements; first: index of the first one, with `values` on both sides. relative: max_abs over
    the largest absolute value of A. norms: Euclidean. guess: in words that other params share, empty where nothing
    explains the difference; detail: what is special to this param. fit: B follows from A to the last bit ("exact"), to
    the rounding of the stored types ("rounding"), or the guess is no computation (""). sampled: the guess was tested on
    some rows and columns of a large param. Numbers that are not finite are null in JSON.
    """

    param: str
    a: str
    b: str
    text: str
    max_abs: float
    norms: tuple[float, float]
    shape: Shape
    count: int
    share: float
    first: Shape
    values: tuple[float, float]
    relative: float
    cosine: float
    guess: str = ""
    detail: str = ""
    fit: str = ""
    sampled: bool = False


@dataclass(frozen=True)
class CheckpointDifference(Readable):
    """All params compared."""

    a: str
    b: str
    params: int
    only_a: list[str]
    only_b: list[str]
    dtypes: list[str]
    differing: list[ParamDifference]

    @property
    def equal(self) -> bool:
        """Same params, same values."""
        return not (self.only_a or self.only_b or self.differing)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        rows = [strict(d.__dict__) for d in self.differing]
        return {"schema_version": 1, "equal": self.equal, **self.__dict__, "differing": rows}


def diff(
    a: Checkpoint, b: Checkpoint, *, explain: bool = True, progress: Progress | None = None
) -> CheckpointDifference:
    """Compare two checkpoints and, if asked, explain what differs.

    Raises:
        ConvertError: MTP028 when they are of different families.
    """
    _same_family(a, b)
    left, right = params(a), params(b)
    pairs = [*_pairs(left, right, left.keys()), *_copies(a, b, left, right)]
    return CheckpointDifference(
        str(a.located.given),
        str(b.located.given),
        sum(n in right for n in left),
        [n for n in left if n not in right],
        [n for n in right if n not in left],
        [f"{p.param}: {p.a.dtype} and {p.b.dtype}" for p in pairs if p.a.dtype != p.b.dtype],
        _explained(pairs, left, right, progress, explain=explain),
    )


def explain_difference(a: Checkpoint, b: Checkpoint, names: Collection[str]) -> list[ParamDifference]:
    """What differs in these params alone, explained as by `diff`; params that one side has not are left out.

    Raises:
        ConvertError: MTP028 when the checkpoints are of different families.
    """
    _same_family(a, b)
    left, right = params(a), params(b)
    wanted = [*_pairs(left, right, names), *(p for p in _copies(a, b, left, right) if p.param in names)]
    return _explained(wanted, left, right, None)


def _same_family(a: Checkpoint, b: Checkpoint) -> None:
    if a.family.name != b.family.name:
        raise ConvertError("MTP028", Problem("two families", got=f"{a.family.name} and {b.family.name}"))


@dataclass(frozen=True)
class Explained:
    """Params that differ in the same way, the worst first."""

    guess: str
    rows: tuple[ParamDifference, ...]


def grouped(rows: Sequence[ParamDifference]) -> list[Explained]:
    """Equal guesses together, the group with the worst param first; what is not explained stays apart."""
    found: dict[str, list[ParamDifference]] = {}
    for row in sorted(rows, key=lambda r: (-_badness(r), r.param)):
        found.setdefault(row.guess or f"\0{row.param}", []).append(row)
    return [Explained(members[0].guess, tuple(members)) for members in found.values()]


def _badness(row: ParamDifference) -> float:
    """The relative difference; what is no number is worse than any."""
    return row.relative if isfinite(row.relative) else float("inf")


class _Pair(NamedTuple):
    """A param of both sides in comparable types; `copy` is the side whose copy tensor is meant, if one is."""

    param: str
    a: TensorExtent
    b: TensorExtent
    copy: str = ""


def _pairs(left: Extents, right: Extents, names: Collection[str]) -> Iterator[_Pair]:
    for name in names:
        if name in left and name in right:
            yield _Pair(name, *alike(left[name], right[name]))


def _copies(a: Checkpoint, b: Checkpoint, left: Extents, right: Extents) -> Iterator[_Pair]:
    """Stored copies of either side with what the other side has for the param."""
    for name, extent in copies(a):
        if name in right:
            yield _Pair(name, *alike(extent, right[name]), "A")
    for name, extent in copies(b):
        if name in left:
            yield _Pair(name, *alike(left[name], extent), "B")


def _explained(
    pairs: Sequence[_Pair], left: Extents, right: Extents, progress: Progress | None, *, explain: bool = True
) -> list[ParamDifference]:
    """Compare the pairs; the rows of those that differ, in their order."""
    measured = compare_all([(p.a, p.b) for p in pairs], progress=progress)
    differing = [(p, d) for p, d in zip(pairs, measured, strict=True) if d is not None]
    if not (differing and explain):
        return [_row(p, d, None) for p, d in differing]
    search = _Search(differing, Elsewhere(left, right), {p.param for p, d in differing if not p.copy})
    search.equal_copies = {
        p.param: (p.copy, _names(p)[p.copy == "B"])
        for p, d in zip(pairs, measured, strict=True)
        if p.copy and d is None
    }
    return [_row(p, d, guess) for (p, d), guess in zip(differing, search.guesses(), strict=True)]


class _Search:
    """Looks for explanations of differing pairs with a few threads."""

    def __init__(self, found: list[tuple[_Pair, Difference]], elsewhere: Elsewhere, wrong: set[str]) -> None:
        self.found = found
        self.elsewhere = elsewhere
        self.wrong = wrong  # params whose main tensors differ
        self.equal_copies: dict[
            str, tuple[str, str]
        ] = {}  # param -> side and name of a copy that equals the other side
        self._guesses: list[Guess | None] = [None] * len(found)

    def guesses(self) -> list[Guess | None]:
        """One per pair. All are looked for among the other params; the values of some of each kind are looked into."""
        self._do(range(len(self.found)), self._by_name)
        kinds: dict[tuple[str, Shape], list[int]] = {}
        for i, (pair, _) in enumerate(self.found):
            if self._guesses[i] is None:
                kinds.setdefault((_kind(pair.param), pair.a.sizes), []).append(i)
        self._do([i for members in kinds.values() for i in members[:EXPLAINED]], self._by_values)
        rest = [members for members in kinds.values() if len(members) > EXPLAINED]
        explained = [any(self._guesses[i] for i in members[:EXPLAINED]) for members in rest]
        self._do([i for m, known in zip(rest, explained, strict=True) if known for i in m[EXPLAINED:]], self._by_values)
        for members, known in zip(rest, explained, strict=True):
            for i in () if known else members[EXPLAINED:]:
                self._guesses[i] = NOT_EXAMINED
        return self._guesses

    def _do(self, which: Collection[int], look: Any) -> None:  # noqa: ANN401 - a method of this class
        def work(i: int, worker: Worker) -> None:
            self._guesses[i] = look(*self.found[i], worker)

        in_threads(which, work, threads=THREADS)

    def _by_name(self, pair: _Pair, d: Difference, worker: Worker) -> Guess | None:
        """Explanations by what else is stored."""
        if pair.copy and pair.param not in self.wrong:
            name = _names(pair)[pair.copy == "B"]
            return Guess("stale copy: the tensors that are copied are equal", f"{pair.copy}'s {name} is another")
        if pair.param in self.equal_copies:
            side, name = self.equal_copies[pair.param]
            other = "A" if side == "B" else "B"
            return Guess(
                f"{side}'s copy holds what {other} has", f"{name} is equal, the tensor it copies is not", "exact"
            )
        if d.count == 1 or pair.copy:
            return None
        return self.elsewhere.find(pair.param, worker.reader)

    def _by_values(self, pair: _Pair, d: Difference, worker: Worker) -> Guess | None:
        """Explanations by the values themselves."""
        stored = not (pair.a.step.shift or pair.b.step.shift or is_coded(pair.a) or is_coded(pair.b))
        if stored and d.count == len(d.examples):
            bits = flipped([(e.a, e.b) for e in d.examples], pair.a.dtype.name)
            if bits is not None:
                return bits
        values = sample(pair.a, pair.b, worker.reader, d.first)
        guess = explain(values, rounding(pair.a, pair.b), share=d.count / d.total)
        if pair.copy or (guess is not None and guess.fit):
            return guess
        return self.elsewhere.mixed(pair.param, worker.reader) or guess


def _kind(param: str) -> str:
    """The name without its numbers."""
    return ".".join("#" if w.isdecimal() else w for w in param.split("."))


def _names(pair: _Pair) -> tuple[str, str]:
    return pair.a.step.sources[0], pair.b.step.sources[0]


def _row(pair: _Pair, d: Difference, guess: Guess | None) -> ParamDifference:
    first = tuple(int(i) for i in np.unravel_index(d.first, pair.a.sizes))
    row = ParamDifference(
        pair.param,
        *_names(pair),
        d.text(),
        d.max_abs,
        d.norms,
        pair.a.sizes,
        d.count,
        d.count / d.total,
        first,
        d.values,
        d.relative,
        d.cosine,
    )
    if guess is None:
        return row
    return replace(row, guess=guess.what, detail=guess.detail, fit=guess.fit, sampled=guess.sampled)
