"""Weights in memory while they are needed: how many groups there are at a time, and what is read when."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from mtp_convert.verify import residency
from mtp_convert.verify.residency import Residency, grouped, slots

CPU = torch.device("cpu")
GROUPS = {str(i): (f"{i}.weight", f"{i}.bias") for i in range(6)}


class Counted:
    """Weights that are all `int(group)`, and a list of what was read; knows which of them are still in memory."""

    def __init__(self) -> None:
        self.read_groups: list[str] = []
        self._made: list[tuple[str, weakref.ref[torch.UntypedStorage]]] = []

    def sources(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        group = next(iter(wanted)).partition(".")[0]
        self.read_groups.append(group)
        found = {name: torch.full(like.shape, float(group)) for name, like in wanted.items()}
        self._made += [(group, weakref.ref(value.untyped_storage())) for value in found.values()]
        return found

    @property
    def alive(self) -> set[str]:
        """Groups of which a tensor still has memory."""
        return {group for group, storage in self._made if storage() is not None}


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(4, 4) for _ in GROUPS))


def runs(model: nn.Module, weights: Counted, groups: str, *, streamed: bool) -> Iterator[str]:
    """Need one group after another."""
    with Residency(model, GROUPS, weights, device=CPU, streamed=streamed, order=list(GROUPS)) as kept:
        for group in groups:
            kept.need(group)
            layer = model.get_submodule(group)
            assert torch.equal(layer.get_parameter("weight"), torch.full((4, 4), float(group)))
            yield group


def test_two_groups_at_most_while_streaming(model: nn.Module) -> None:
    weights = Counted()
    for group in runs(model, weights, "012345", streamed=True):
        assert weights.alive <= {group, str(int(group) + 1)}
    assert weights.read_groups == list(GROUPS)


def test_one_group_where_they_are_large(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "AHEAD", 79)  # a group has 80 bytes
    weights = Counted()
    for group in runs(model, weights, "012345", streamed=True):
        assert weights.alive == {group}


def test_all_groups_stay_without_streaming(model: nn.Module) -> None:
    weights = Counted()
    for group in runs(model, weights, "010234512", streamed=False):
        assert weights.alive >= set(map(str, range(int(group) + 1)))
    assert sorted(weights.read_groups) == list(GROUPS)


def test_a_wrong_guess_costs_a_read_and_nothing_else(model: nn.Module) -> None:
    weights = Counted()
    for group in runs(model, weights, "0524", streamed=True):
        assert group in weights.alive
    assert weights.read_groups[:3] == ["0", "1", "5"]


def test_nothing_is_left_at_the_end(model: nn.Module) -> None:
    weights = Counted()
    list(runs(model, weights, "01", streamed=False))
    assert weights.alive == set()
    assert all(p.is_meta for p in model.parameters())


def test_nothing_is_left_after_an_error(model: nn.Module) -> None:
    kept = Residency(model, GROUPS, Counted(), device=CPU, streamed=True, order=())
    kept.need("0")
    with pytest.raises(KeyError), kept:
        kept.need("unknown")
    assert all(p.is_meta for p in model.parameters())


def test_groups_by_the_longest_prefix(model: nn.Module) -> None:
    names = ["a.weight", "a.b.weight", "a.b.c.weight"]
    found = grouped(names, {"a": "first", "a.b": "second"})
    assert found == {"first": ("a.weight",), "second": ("a.b.weight", "a.b.c.weight")}
    with pytest.raises(ValueError, match=r"belong to no place: 0\.weight, 0\.bias"):
        grouped(["1.weight", *GROUPS["0"]], {"1": "first"})


def test_shared_tensors_have_a_slot_at_every_place() -> None:
    with torch.device("meta"):
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    root = nn.ModuleDict({"first": first, "second": second})
    root.register_buffer("kept", torch.zeros(1))
    root.register_buffer("computed", torch.zeros(1), persistent=False)
    assert set(slots(root)) == {"first.weight", "second.weight", "kept"}
