"""Verdicts in 16 and 64 bits: near ties of a router raise no alarm and hide no mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from _families import config_of, random_folder, random_tensors
from _kit import convert, hf_folder
from _mistakes import forget_rope_order, swap_halves

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.verify.options import VerifyOptions
from mtp_convert.verify.result import Verification
from mtp_convert.verify.run import verify

SEED = 3  # with these weights, in bfloat16, a token in 128 takes another expert on the other side


def verified(a: Path, b: Path, dtype: str) -> Verification:
    options = VerifyOptions(dtype=dtype, device="cpu", levels=("forward",))  # type: ignore[arg-type]
    return verify(open_checkpoint(a), open_checkpoint(b), options)


@pytest.mark.parametrize(
    ("family", "dtype"), [("glm4_moe_lite", "bfloat16"), ("hy_v3", "bfloat16"), ("qwen3_5", "float64")]
)
def test_a_healthy_conversion_passes(family: str, dtype: str, tmp_path: Path) -> None:
    a = random_folder(family, tmp_path / "a", SEED)
    convert(a, tmp_path / "b", "megatron")
    found = verified(a, tmp_path / "b", dtype)
    assert found.ok, [s.problems for s in found.sections]


@pytest.mark.parametrize(("change", "place"), [(swap_halves, "mtp.0.fused"), (forget_rope_order, "layers.0")])
def test_a_mistake_is_seen_where_keys_are_chosen(change: object, place: str, tmp_path: Path) -> None:
    """An indexer's near ties make the largest floor of glm_moe_dsa 0.6: a mistake must not hide below it."""
    tensors = random_tensors("glm_moe_dsa", SEED)
    assert callable(change)
    change(tensors)
    a = random_folder("glm_moe_dsa", tmp_path / "a", SEED)
    convert(hf_folder(tmp_path / "source", tensors, config_of("glm_moe_dsa")), tmp_path / "b", "megatron")
    found = verified(a, tmp_path / "b", "bfloat16")
    assert [p.place for p in found.places if not p.ok] == [place]
