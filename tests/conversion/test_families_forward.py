"""Proof of the tables: transformers and the Megatron tree compute the same, and no wrong table hides from that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _families import CONFIGS, VARIANTS, family_of, random_folder
from _kit import convert
from _swaps import Swap, swaps
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.verify.forward import Forward, predict, relative_error, run_hf

EQUAL = 1e-4  # relative, float32
SEEN = 1e-3
RUN = [
    "deepseek_v3",
    "deepseek_v4",
    "nemotron_h",
    "qwen3",
    "qwen3_5",
    "qwen3_next",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mimo",
    "exaone_moe",
    "mellum",
    "hy_v3",
    *VARIANTS,
]
LENGTH = 24  # tokens: more compressed keys than a sparse layer chooses, so that its choice counts
# Swaps that change no number at all, with the reason.
EQUIVALENT: dict[str, dict[str, str]] = {}


def token_ids() -> Tensor:
    return torch.randint(0, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def megatron(folder: Path) -> Forward:
    out = predict(open_checkpoint(folder).stored, token_ids())
    return Forward(out.logits, out.mtp_logits)


def worst(a: Forward, b: Forward) -> float:
    """The largest relative error of any output."""
    pairs = zip((a.logits, *a.mtp_logits), (b.logits, *b.mtp_logits), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", RUN)
def test_both_sides_compute_the_same(name: str, tmp_path: Path) -> None:
    source = random_folder(name, tmp_path / "hf")
    convert(source, tmp_path / "megatron", "megatron")
    hf, there = run_hf(source, token_ids()), megatron(tmp_path / "megatron")
    assert len(there.mtp_logits) == family_of(name)[1].depths > 0
    error = worst(there, hf)
    print(f"{name}: {error:.1e}")
    assert error < EQUAL


@pytest.mark.mutants
@pytest.mark.parametrize("name", RUN)
def test_every_wrong_table_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random_folder(name, tmp_path / "hf")
    hf = run_hf(source, token_ids())
    family, dims = family_of(name)
    wrong = [s for s in swaps(family.layout("hf", dims)) if s.name not in EQUIVALENT.get(name, {})]
    survivors, weakest = [], float("inf")
    for number, swap in enumerate(wrong):
        error = error_of(swap, source, tmp_path / str(number), hf, monkeypatch)
        weakest = min(weakest, error)
        if error < SEEN:
            survivors.append(f"{swap.name}: {error:.1e}")
    print(f"{name}: {len(wrong) - len(survivors)} of {len(wrong)} killed, weakest {weakest:.1e}")
    assert survivors == []


def error_of(swap: Swap, source: Path, target: Path, hf: Forward, monkeypatch: pytest.MonkeyPatch) -> float:
    with monkeypatch.context() as patch:
        patch.setattr("mtp_convert.convert.folding", lambda *_: (swap.alias, ()))
        convert(source, target, "megatron")
    return worst(megatron(target), hf)


def test_every_family_is_compared_or_says_why_not() -> None:
    from mtp_convert.adapters import families

    assert {f.name for f in families() if not f.unproven} == set(RUN) - VARIANTS.keys()


def test_every_family_has_a_tiny_config() -> None:
    from mtp_convert.adapters import families

    assert CONFIGS.keys() == {f.name for f in families()}
