"""Norms that Megatron counts from 0 and Hugging Face from 1: values, element types, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _dist import RELEASE, read
from _families import config_of, random_tensors
from _kit import convert, differing, hf_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_convert.checkpoint import PROVENANCE, open_checkpoint
from mtp_convert.difference import diff

WEIGHTS = "model.safetensors"
HF, MEGATRON = "model.layers.0.linear_attn.norm.weight", "decoder.layers.0.self_attention.out_norm.weight"
OTHER = "model.layers.2.linear_attn.norm.weight"
NORM = torch.tensor([-0.0, 0.1, 1.0078125, -3e-5])  # 0.1 and -3e-5 lose bits in any 16-bit or 32-bit shift


def source(scratch: Path, dtype: torch.dtype, norm: Tensor = NORM) -> Path:
    tensors = {n: t.to(dtype) for n, t in random_tensors("qwen3_next").items()}
    return hf_folder(scratch / "hf", {**tensors, HF: norm.to(dtype)}, config_of("qwen3_next"))


def back(there: Path, folder: Path, **options: str) -> dict[str, Tensor]:
    convert(there, folder, "hf", **options)
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits_become_float32_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = source(tmp_path, dtype)
    convert(folder, tmp_path / "there", "megatron")
    stored = read(tmp_path / "there" / RELEASE)
    assert stored[MEGATRON].dtype == torch.float32
    assert torch.equal(stored[MEGATRON], (NORM.to(dtype).double() - 1).float())
    assert stored["decoder.layers.0.self_attention.dt_bias"].dtype == dtype
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(folder, tmp_path / "back") == []


def test_without_notes_the_values_come_back_rounded_once(tmp_path: Path) -> None:
    folder = source(tmp_path, torch.bfloat16)
    convert(folder, tmp_path / "there", "megatron")
    (tmp_path / "there" / PROVENANCE).unlink()
    found = back(tmp_path / "there", tmp_path / "back")[HF]
    assert found.dtype == torch.float32
    assert torch.equal(found, NORM.bfloat16().float() + 0.0)  # all but the sign of zero: float32 holds these


def test_trained_values_are_shifted_and_others_come_back(tmp_path: Path) -> None:
    """Notes are only good for the values that they led to."""
    folder = source(tmp_path, torch.float32)
    convert(folder, tmp_path / "there", "megatron")
    there = tmp_path / "there"
    notes = json.loads((there / PROVENANCE).read_text())["layouts"]["hf"]["shifted"]
    assert notes.keys() == {HF, OTHER}
    assert notes[HF] == f"F32 {NORM.numpy().tobytes().hex()}"
    tensors = load_file(folder / WEIGHTS)
    trained = hf_folder(tmp_path / "trained", {**tensors, HF: NORM + 1}, config_of("qwen3_next"))
    convert(trained, tmp_path / "later", "megatron")
    (tmp_path / "later" / PROVENANCE).write_bytes((there / PROVENANCE).read_bytes())
    found = back(tmp_path / "later", tmp_path / "back")
    assert torch.equal(found[HF], ((NORM + 1).double() - 1).float() + 1)
    assert torch.equal(found[OTHER], tensors[OTHER])


@pytest.mark.parametrize("note", ["F32 00", "F32 zz", "BF16 " + "00" * 8, "F99 " + "00" * 16, "", "F32"])
def test_notes_that_are_none_are_ignored(note: str, tmp_path: Path) -> None:
    folder = source(tmp_path, torch.float32, NORM + 1)
    convert(folder, tmp_path / "there", "megatron")
    path = tmp_path / "there" / PROVENANCE
    facts = json.loads(path.read_text())
    facts["layouts"]["hf"]["shifted"] = {HF: note, OTHER: 5}
    path.write_text(json.dumps(facts))
    found = back(tmp_path / "there", tmp_path / "back")[HF]
    assert torch.allclose(found.float(), NORM + 1, atol=1e-2 if found.dtype == torch.bfloat16 else 1e-6)


def test_an_asked_for_type_wins(tmp_path: Path) -> None:
    folder = source(tmp_path, torch.float32)
    convert(folder, tmp_path / "there", "megatron", dtype="bf16")
    assert torch.equal(read(tmp_path / "there" / RELEASE)[MEGATRON], (NORM.double() - 1).bfloat16())
    found = back(tmp_path / "there", tmp_path / "back", dtype="fp32")
    assert torch.equal(found[HF], (NORM.double() - 1).bfloat16().float() + 1)


def test_sixteen_bits_are_equal_to_their_float32(tmp_path: Path) -> None:
    folder = source(tmp_path, torch.bfloat16)
    convert(folder, tmp_path / "there", "megatron")
    assert diff(open_checkpoint(folder), open_checkpoint(tmp_path / "there")).equal
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, HF: tensors[HF] + 1}, folder / WEIGHTS, metadata={"format": "pt"})
    found = diff(open_checkpoint(folder), open_checkpoint(tmp_path / "there"))
    assert [d.param for d in found.differing] == ["layers.0.attention.out_norm"]
