"""The real megatron-core builds GPT models from the arguments that we wrote, loads strictly and computes the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import FIXTURES, MEGATRON, convert, hf_folder
from _megatron import Megatron, install
from safetensors.torch import load_file, save_file

from mtp_convert.adapters import find
from mtp_convert.verify.forward import relative_error, run_hf

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # float32; what is seen is 2e-6
NAMES = ["qwen3_next", "qwen3_5"]


@pytest.fixture(scope="module")
def megatron() -> Megatron:
    try:
        return install("0.19.2")
    except FileNotFoundError as error:
        if os.environ.get("MTP_CONVERT_REQUIRE_REFERENCE"):
            raise
        pytest.skip(str(error))


def random_folder(name: str, folder: Path) -> Path:
    """Random weights of a family's tiny config: norms around 1, or around 0 where they count from there."""
    config: dict[str, Any] = json.loads((FIXTURES / "configs" / f"{name}.json").read_text())
    family, _ = find(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor, binding in family.layout("hf", family.dims(config, 1)).bindings.items():
        noise = torch.randn(binding.shape, generator=generator)
        tensors[tensor] = 1 + 0.2 * noise if len(binding.shape) == 1 else 0.15 * noise
    return hf_folder(folder, tensors, config)


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_computes_what_transformers_computes(name: str, container: str, megatron: Megatron, tmp_path: Path) -> None:
    source = random_folder(name, tmp_path / "hf")
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    convert(source, tmp_path / "there", "megatron", container=container)
    found = run(megatron, tmp_path / "there", tmp_path / "tokens.safetensors", legacy=container == "legacy")
    expected = run_hf(source, tokens)
    errors = [relative_error(found["logits"], expected.logits)]
    errors += [relative_error(found[f"logits_mtp{k}"], logits) for k, logits in enumerate(expected.mtp_logits)]
    print(name, errors)
    assert len(errors) == 2
    assert max(errors) < TOLERANCE


def test_two_depths_of_qwen3_compute_what_they_did(megatron: Megatron, tmp_path: Path) -> None:
    source = MEGATRON / "qwen2_te"
    convert(source / "ckpt", tmp_path / "hf", "hf", hf_config=source / "config.json")
    convert(tmp_path / "hf", tmp_path / "there", "megatron")
    found = run(megatron, tmp_path / "there", source / "out.safetensors")
    expected = load_file(source / "out.safetensors")
    errors = {k: relative_error(found[k], expected[k]) for k in ("logits", "logits_mtp0", "logits_mtp1")}
    print(errors)
    assert max(errors.values()) < TOLERANCE


def run(megatron: Megatron, folder: Path, tokens: Path, *, legacy: bool = False) -> dict[str, torch.Tensor]:
    """What the real model computes from a checkpoint that it loaded with every name accounted for."""
    out = folder.parent / "out.safetensors"
    megatron.run("run_gpt.py", "--load", folder, "--tokens", tokens, "--out", out, *(["--legacy"] if legacy else []))
    return load_file(out)
