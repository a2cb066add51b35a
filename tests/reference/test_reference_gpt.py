"""The real megatron-core builds GPT models from the arguments that we wrote, loads strictly and computes the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from _families import family_of, random_folder
from _kit import MEGATRON, convert
from _megatron import Megatron, install
from safetensors.torch import load_file, save_file

from mtp_convert.verify.forward import relative_error, run_hf

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # float32; what is seen is 2e-6, with delta nets 6e-5
NAMES = [
    "deepseek_v3",
    "deepseek_v3-indexer",
    "deepseek_v3-yarn",
    "qwen3",
    "qwen3-one",
    "qwen3_5",
    "qwen3_5-dense",
    "qwen3_next",
    "glm4_moe",
    "glm4_moe-air",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mimo",
    "exaone_moe",
    "mellum",
    "mellum-dense",
    "hy_v3",
]
DENSE_MTP = ["exaone_moe", "mellum-dense"]  # behind a last layer with experts: a layer spec of the caller's


@pytest.fixture(scope="module")
def megatron() -> Megatron:
    try:
        return install("0.19.2")
    except FileNotFoundError as error:
        if os.environ.get("MTP_CONVERT_REQUIRE_REFERENCE"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "container"), [(n, "torch_dist") for n in NAMES] + [(n, "legacy") for n in NAMES if "-" not in n]
)
def test_computes_what_transformers_computes(name: str, container: str, megatron: Megatron, tmp_path: Path) -> None:
    source = random_folder(name, tmp_path / "hf")
    tokens = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    convert(source, tmp_path / "there", "megatron", container=container)
    flags = ["--legacy"] * (container == "legacy") + ["--dense-mtp"] * (name in DENSE_MTP)
    found = run(megatron, tmp_path / "there", tmp_path / "tokens.safetensors", *flags)
    expected = run_hf(source, tokens)
    errors = [relative_error(found["logits"], expected.logits)]
    errors += [relative_error(found[f"logits_mtp{k}"], logits) for k, logits in enumerate(expected.mtp_logits)]
    print(name, errors)
    assert len(errors) == 1 + family_of(name)[1].depths > 1
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("words", [{}, {"shards": "single", "decoder": "per_layer"}], ids=["stacked", "singleton"])
def test_two_depths_of_qwen3_compute_what_they_did(words: dict[str, str], megatron: Megatron, tmp_path: Path) -> None:
    """Also under keys that the checkpoint's `content_metadata` has to announce."""
    source = MEGATRON / "qwen2_te"
    convert(source / "ckpt", tmp_path / "hf", "hf", hf_config=source / "config.json")
    convert(tmp_path / "hf", tmp_path / "there", "megatron", words=words)
    found = run(megatron, tmp_path / "there", source / "out.safetensors")
    expected = load_file(source / "out.safetensors")
    errors = {k: relative_error(found[k], expected[k]) for k in ("logits", "logits_mtp0", "logits_mtp1")}
    print(errors)
    assert max(errors.values()) < TOLERANCE


def run(megatron: Megatron, folder: Path, tokens: Path, *flags: str) -> dict[str, torch.Tensor]:
    """What the real model computes from a checkpoint that it loaded with every name accounted for."""
    out = folder.parent / "out.safetensors"
    megatron.run("run_gpt.py", "--load", folder, "--tokens", tokens, "--out", out, *flags)
    return load_file(out)
