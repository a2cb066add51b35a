"""Runs two sides on the same tokens and says, place by place, whether they compute the same.

Three passes. A runs freely, and every place's input and output is kept. A runs again in another precision, every place
on the input it had: the difference is what rounding makes there, the floor. B runs on a batch of twice the rows: one
half freely, one half with A's input at every place. If every place gives the same from the same input, so does the
whole, by induction; and neither accumulated rounding nor a router that breaks a tie otherwise can blur the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from mtp_convert.verify.metrics import Distance, distance, scores
from mtp_convert.verify.result import LogitScores, PlaceError
from mtp_convert.verify.side import Side, Tap
from mtp_convert.verify.taps import Forced, Halves, Recorder, Synthetic

# The precision that shows the rounding of another. Both stacks compute norms, scans and softmax in float32, whatever
# the dtype: told float64 they round as in float32 there.
COMPARED = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float32,
}
# How far two programs may be apart, in units of the floor, which knows one program's rounding only. In float32 the
# mildest mistake lies orders of magnitude above. Of 31 healthy models none reaches 2 in bfloat16, of 74 with a mistake
# in their values all pass 28.
ROOM = {torch.bfloat16: 6.0, torch.float16: 6.0, torch.float32: 32.0, torch.float64: 32.0}
# Rounding steps that are granted to every place: a floor can be 0 by luck.
LEAST = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 8.0, torch.float64: 8.0}
# The share of tokens that does not count in 16 bits where experts or keys are chosen: a near tie falls the other way
# for one token in a hundred, and what is computed for it then has nothing in common.
SPARED = 0.1


@dataclass(frozen=True)
class Conditions:
    """How sides run: compute dtype, device, and whether weights are streamed."""

    dtype: torch.dtype
    device: torch.device
    streamed: bool


@dataclass(frozen=True)
class Verdict:
    """What the passes found; `scores` is empty when only some places ran."""

    places: tuple[PlaceError, ...]
    scores: tuple[LogitScores, ...]


def judge(a: Side, b: Side, ids: Tensor, conditions: Conditions) -> Verdict:
    """Compare all places of two sides on `ids` [B, S].

    Of all three passes only the activations of the first are kept. ValueError when the sides have different places or
    shapes.
    """
    _same_places(a, b)
    first = Recorder()
    _run(a, ids, first, conditions)
    floors = _floors(a, ids, first, conditions)
    other = _HalvesApart(first.inputs, known=first.outputs, dtype=conditions.dtype)
    _run(b, torch.cat([ids, ids]), other, conditions)
    places = _places(a.places(), other.apart, other.chained, floors, conditions.dtype)
    return Verdict(places, _scores(a.places(), first.outputs, other.free, ids))


def judge_some(a: Side, b: Side, ids: Tensor, conditions: Conditions, only: Sequence[str], seed: int) -> Verdict:
    """Compare some places alone, each on random inputs; the other places' weights are not read."""
    _same_places(a, b)
    first = Synthetic(seed)
    _run(a, ids, first, conditions, only)
    floors = _floors(a, ids, first, conditions, only)
    other = _Apart(first.inputs, known=first.outputs, dtype=conditions.dtype)
    _run(b, ids, other, conditions, only)
    chained = {p: d.relative for p, d in other.apart.items()}
    return Verdict(_places(only, other.apart, chained, floors, conditions.dtype), ())


def sample(side: Side) -> tuple[str, ...]:
    """A few places that stand for all: the ends, MTP, and of every kind of layer the first, middle and last one.

    Layers are of one kind when their tensors have the same names but for the numbers.
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for place in side.places():
        if place.startswith("layers."):
            leaves = {".".join(w for w in n.split(".") if not w.isdecimal()) for n in side.tensors(place)}
            kinds.setdefault(tuple(sorted(leaves)), []).append(place)
    chosen = {layers[i] for layers in kinds.values() for i in (0, len(layers) // 2, -1)}
    return tuple(p for p in side.places() if p in chosen or not p.startswith("layers."))


def _same_places(a: Side, b: Side) -> None:
    if a.places() != b.places():
        only = sorted(set(a.places()) ^ set(b.places()))
        raise ValueError(f"the sides run other places: {', '.join(only) or 'in another order'}")


def _run(side: Side, ids: Tensor, tap: Tap, conditions: Conditions, only: Sequence[str] | None = None) -> None:
    c = conditions
    side.run(ids, tap, dtype=c.dtype, device=c.device, streamed=c.streamed, only=only)


def _floors(
    side: Side, ids: Tensor, first: Recorder | Synthetic, conditions: Conditions, only: Sequence[str] | None = None
) -> dict[str, float]:
    """What rounding alone makes of every place: the first outputs against another precision on the same inputs."""
    other = _Apart(first.inputs, known=first.outputs, dtype=conditions.dtype)
    _run(side, ids, other, replace(conditions, dtype=COMPARED[conditions.dtype]), only)
    return {p: d.relative for p, d in other.apart.items()}


def _places(
    names: Sequence[str],
    apart: Mapping[str, Distance],
    chained: Mapping[str, float],
    floors: Mapping[str, float],
    dtype: torch.dtype,
) -> tuple[PlaceError, ...]:
    """One row per place. No place gets less room than the typical one: rounding is luck where numbers are few."""
    least = LEAST[dtype] * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    typical = median(floors[p] for p in names)
    rows = []
    for p in names:
        most_abs, mean_abs, relative, cosine = apart[p]
        threshold = max(least, ROOM[dtype] * max(floors[p], typical))
        rows.append(PlaceError(p, most_abs, mean_abs, relative, cosine, floors[p], threshold, chained[p]))
    return tuple(rows)


@dataclass
class _Apart(Forced):
    """Keeps how far outputs are from `known` ones, and not the outputs."""

    _: KW_ONLY
    known: Mapping[str, Tensor]
    dtype: torch.dtype
    apart: dict[str, Distance] = field(default_factory=dict)

    def leave(self, place: str, value: Tensor) -> None:
        self.apart[place] = _distance(place, self.known[place], value.detach().cpu(), self.dtype)


@dataclass
class _HalvesApart(Halves):
    """The same for both halves of a batch; of the free one logits are kept."""

    _: KW_ONLY
    known: Mapping[str, Tensor]
    dtype: torch.dtype
    apart: dict[str, Distance] = field(default_factory=dict)
    chained: dict[str, float] = field(default_factory=dict)

    def leave(self, place: str, value: Tensor) -> None:
        free, forced = (half.detach().cpu() for half in value.chunk(2))
        self.apart[place] = _distance(place, self.known[place], forced, self.dtype)
        self.chained[place] = distance(self.known[place], free).relative
        if place.endswith("logits"):
            self.free[place] = free.clone()


def _distance(place: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> Distance:
    """Distances of [B, S, H]; in 16 bits `relative` leaves out the worst tokens where a near tie may be decided."""
    found = distance(a, b)
    chooses = place.startswith("layers.") or place.endswith(".block")
    if dtype.itemsize > 2 or not chooses or not 0 < found.relative < float("inf"):
        return found
    gaps = (a.double() - b.double()).nan_to_num().abs().amax(-1).flatten()  # [B * S]
    return found._replace(relative=found.relative * float(gaps.quantile(1 - SPARED) / gaps.max()))


def _scores(
    names: Sequence[str], first: Mapping[str, Tensor], free: Mapping[str, Tensor], ids: Tensor
) -> tuple[LogitScores, ...]:
    mains = first["logits"], free["logits"]
    rows = [scores("logits", *mains, ids)]
    drafts = [p for p in names if p.startswith("mtp.") and p.endswith(".logits")]
    return (*rows, *(scores(p, first[p], free[p], ids, mains) for p in drafts))
