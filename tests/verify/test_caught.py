"""Every mistake is caught by the forward passes alone and named by its place; healthy conversions raise no alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
from _families import random_folder
from _kit import convert
from _mistakes import Mistake, value_mistakes, wrong_table
from test_families_forward import RUN

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.verify.options import VerifyOptions
from mtp_convert.verify.result import Verification
from mtp_convert.verify.run import verify

FORWARD = VerifyOptions(rows=1, length=24, levels=("names", "shapes", "forward"))
EVERYTHING = VerifyOptions(rows=1, length=24)
SEEDS = 5


def verified(folder: Path, options: VerifyOptions) -> Verification:
    return verify(open_checkpoint(folder / "a"), open_checkpoint(folder / "b"), options)


def caught_and_named(mistake: Mistake, folder: Path) -> tuple[bool, bool]:
    """Whether the forward passes see a mistake, and whether what they name holds one of its tensors."""
    mistake.make(folder)
    found = verified(folder, FORWARD)
    if found.ok or found.culprit is None:
        return False, False
    return True, bool(mistake.tensors & set(found.culprit.a))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
def test_damaged_values_are_caught_and_named(family: str, tmp_path: Path) -> None:
    missed = []
    for number, mistake in enumerate(value_mistakes(family)):
        if caught_and_named(mistake, tmp_path / str(number)) != (True, True):
            missed.append(mistake.name)
    assert missed == []


@pytest.mark.mutants
@pytest.mark.parametrize("family", RUN)
def test_every_mistake_is_caught_and_named(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, caught, named, missed = 0, 0, 0, []
    for number, mistake in enumerate([*value_mistakes(family), *wrong_table(family, monkeypatch)]):
        seen, right = caught_and_named(mistake, tmp_path / str(number))
        tried, caught, named = tried + 1, caught + seen, named + right
        if not (seen and right):
            missed.append(f"{mistake.name}: {'caught, another place named' if seen else 'not caught'}")
    print(f"{family}: caught {caught} of {tried}, named {named} of {caught}", *missed, sep="\n  ")
    assert caught == tried
    assert named == caught


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_healthy_conversion_passes_every_level(family: str, dtype: str, tmp_path: Path) -> None:
    random_folder(family, tmp_path / "random")
    convert(tmp_path / "random", tmp_path / "a", "hf", dtype=dtype)
    convert(tmp_path / "a", tmp_path / "b", "megatron")
    found = verified(tmp_path, EVERYTHING)
    assert found.ok, [s.problems for s in found.sections]
    assert [s.compared > 0 for s in found.sections] == [True] * 4


@pytest.mark.mutants
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", RUN)
def test_healthy_conversions_raise_no_alarm(family: str, dtype: str, tmp_path: Path) -> None:
    alarms, worst = [], 0.0
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        random_folder(family, folder / "random", seed)
        convert(folder / "random", folder / "a", "hf", dtype=dtype)
        convert(folder / "a", folder / "b", "megatron")
        found = verified(folder, EVERYTHING)
        worst = max(worst, *(p.relative / p.threshold for p in found.places))
        if not found.ok:
            alarms.append((seed, [s.problems for s in found.sections if not s.ok]))
    print(f"{family}, {dtype}: {len(alarms)} alarms in {SEEDS}, nearest place at {worst:.2f} of its threshold")
    assert alarms == []
