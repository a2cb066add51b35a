"""The judge, over sides that are written here: what it calls wrong, where, and what it must not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mtp_convert.verify.judge import Conditions, judge, sample
from mtp_convert.verify.result import SideFacts
from mtp_convert.verify.side import Tap

SIZE, VOCAB = 16, 11
CPU = Conditions(torch.float32, torch.device("cpu"), streamed=False)
PLACES = (
    "embedding",
    "layers.0",
    "layers.1",
    "layers.2",
    "final_norm",
    "logits",
    "mtp.0.fused",
    "mtp.0.block",
    "mtp.0.logits",
)


def weight(place: str, rows: int = SIZE) -> Tensor:
    """[rows, H], another one for every place; the head is the same for all logits."""
    seed = 99 if place.endswith("logits") else PLACES.index(place)
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed)) / 4


@dataclass
class Toy:
    """A model of matrices; `change` makes another one of a place's output."""

    change: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    names: Sequence[str] = PLACES
    facts: SideFacts = field(default_factory=lambda: SideFacts("toy", "toy", "hf", "none", {}))

    def places(self) -> tuple[str, ...]:
        return tuple(self.names)

    def tensors(self, place: str) -> tuple[str, ...]:
        kind = "odd" if place.startswith("layers.") and int(place[7:]) % 2 else "even"
        return (f"{place}.{kind}",)

    def run(
        self,
        ids: Tensor,
        tap: Tap,
        *,
        dtype: torch.dtype,
        device: torch.device,
        streamed: bool,
        only: Collection[str] | None = None,
    ) -> None:
        value = torch.nn.functional.embedding(ids, weight("embedding", VOCAB)).to(dtype)
        hidden: dict[str, Tensor] = {}
        for place in self.places():
            if place != "embedding":
                value = hidden["final_norm"] if place in ("logits", "mtp.0.fused") else value
                value = tap.enter(place, value)
                value = torch.tanh(value @ weight(place, VOCAB if place.endswith("logits") else SIZE).to(dtype).T)
            value = self.change.get(place, lambda x: x)(value)
            tap.leave(place, value)
            hidden[place] = value


def ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) % VOCAB


def test_equal_sides_are_equal() -> None:
    verdict = judge(Toy(), Toy(), ids(), CPU)
    assert [p.place for p in verdict.places] == list(PLACES)
    assert all(p.ok for p in verdict.places)
    assert all(p.floor < 1e-6 < p.threshold < 1e-3 for p in verdict.places[1:])
    assert [s.kl for s in verdict.scores] == [0, 0]


@pytest.mark.parametrize("place", PLACES)
def test_one_wrong_place_is_the_only_one_named(place: str) -> None:
    wrong = Toy({place: lambda x: x + 1e-3 * x.abs().max()})
    verdict = judge(Toy(), wrong, ids(), CPU)
    assert [p.place for p in verdict.places if not p.ok] == [place]
    behind = [p for p in verdict.places if p.place == "logits"]
    assert behind[0].chained > 1e-5 or place.startswith("mtp"), "on its own inputs the mistake travels on"


def test_not_a_number_is_wrong() -> None:
    verdict = judge(Toy(), Toy({"layers.1": lambda x: x * float("nan")}), ids(), CPU)
    assert [p.place for p in verdict.places if not p.ok] == ["layers.1"]


def test_rounding_of_another_order_is_no_mistake() -> None:
    noise = torch.Generator().manual_seed(1)

    def rounded(x: Tensor) -> Tensor:
        return x * (1 + 2e-7 * torch.randn(x.shape, generator=noise, dtype=x.dtype))

    verdict = judge(Toy(), Toy(dict.fromkeys(PLACES, rounded)), ids(), CPU)
    assert all(p.ok for p in verdict.places)
    assert max(p.relative for p in verdict.places) > 0


def test_other_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mtp\.0\.block"):
        judge(Toy(), Toy(names=[p for p in PLACES if p != "mtp.0.block"]), ids(), CPU)


def test_a_sample_has_every_kind_of_layer() -> None:
    many = ["embedding", *(f"layers.{i}" for i in range(40)), "final_norm", "logits"]
    assert sample(Toy(names=many)) == (
        *("embedding", "layers.0", "layers.1", "layers.20", "layers.21", "layers.38", "layers.39"),
        *("final_norm", "logits"),
    )
