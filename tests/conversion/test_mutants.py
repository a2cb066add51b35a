"""Mutation test of the proof: a table with one wrong rule round trips, and only the forward passes can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from _kit import TINY, convert, differing, there_and_back
from _mutants import HYBRID, Mutant, all_mutants
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert import adapters
from mtp_convert.adapters import nemotron_h
from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.mapping.family import Family
from mtp_convert.verify.forward import Forward, relative_error, run_hf, run_megatron

SEEN = 1e-2  # relative; a right table gives 1e-6
MUTANTS = list(all_mutants())
Install = Callable[[Mutant], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a wrong table in the place of the true one."""

    def use(mutant: Mutant) -> None:
        true: Family = nemotron_h.FAMILY
        wrong = replace(true, places=lambda dims: map(mutant.change, true.places(dims)))
        monkeypatch.setattr(nemotron_h, "FAMILY", wrong)
        adapters.families.cache_clear()

    yield use
    monkeypatch.undo()
    adapters.families.cache_clear()


@cache
def expected(source: Path) -> tuple[Tensor, Forward]:
    """Token ids, and what transformers computes."""
    if source == TINY:
        ids = torch.tensor(list((TINY.parent / "text" / "heldout.txt").read_bytes()[:64])).view(1, 64)
    else:
        ids = load_file(source / "io.safetensors")["input_ids"]
    return ids, run_hf(source, ids)


def worst(folder: Path, source: Path) -> float:
    """The largest relative error of any output of the Megatron side."""
    ids, wanted = expected(source)
    out = run_megatron(open_checkpoint(folder).stored, ids)
    pairs = zip((out.logits, *out.mtp_logits), (wanted.logits, *wanted.mtp_logits), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


@pytest.mark.parametrize("source", [HYBRID, TINY], ids=lambda p: p.name)
def test_true_table_passes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "there", "megatron")
    assert worst(tmp_path / "there", source) < 2e-4


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_wrong_table_is_sound_in_itself_and_fails_the_forward_pass(
    mutant: Mutant, install: Install, tmp_path: Path
) -> None:
    expected(mutant.source)
    install(mutant)
    there, back = there_and_back(mutant.source, tmp_path)
    assert differing(mutant.source, back) == []
    error = worst(there, mutant.source)
    print(f"{mutant.name}: {error:.2g}")
    assert error > SEEN
