"""The verifier on a GPU: the same verdicts as on the CPU, with figures that rounding explains."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, convert, golden_config, golden_tensors, hf_folder
from test_verify import FOLDERS, SHORT, verified

from mtp_convert.verify.options import VerifyOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = replace(SHORT, device="cuda")
CPU = replace(SHORT, device="cpu")
APART = 16.0  # times the floor: two devices sum in different orders


@pytest.mark.parametrize("name", FOLDERS)
def test_float32_passes_and_its_figures_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / name, tmp_path / "b", "megatron")
    there, here = (verified(AUTOMODEL / name, tmp_path / "b", options) for options in (CUDA, CPU))
    assert there.ok, [s.problems for s in there.sections]
    assert there.device != here.device == "cpu"
    assert [p.place for p in there.places] == [p.place for p in here.places]
    for on_gpu, on_cpu in zip(there.places, here.places, strict=True):
        assert on_gpu.floor <= APART * max(on_cpu.floor, torch.finfo(torch.float32).eps), on_gpu.place
    assert [s.loss for s in there.scores] == [pytest.approx(s.loss, rel=1e-3) for s in here.scores]


@pytest.mark.parametrize("name", FOLDERS)
def test_bfloat16_passes(name: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / name, tmp_path / "b", "megatron")
    found = verified(AUTOMODEL / name, tmp_path / "b", VerifyOptions(device="cuda", dtype="bfloat16"))
    assert found.ok, [s.problems for s in found.sections]
    assert max(p.floor for p in found.places) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapped_halves_are_seen(dtype: str, tmp_path: Path) -> None:
    a = AUTOMODEL / "nemotron_d1"
    convert(swapped(tmp_path / "source"), tmp_path / "b", "megatron")
    found = verified(a, tmp_path / "b", VerifyOptions(device="cuda", dtype=dtype))  # type: ignore[arg-type]
    assert [p.place for p in found.places if not p.ok] == ["mtp.0.fused"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_equals_whole(dtype: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / "nemotron_d1", tmp_path / "b", "megatron")
    options = VerifyOptions(device="cuda", dtype=dtype)  # type: ignore[arg-type]
    whole, streamed = (
        verified(AUTOMODEL / "nemotron_d1", tmp_path / "b", replace(options, mode=m)) for m in ("whole", "streamed")
    )
    assert whole.ok
    assert streamed.ok
    assert [p.place for p in streamed.places] == [p.place for p in whole.places]


def test_streamed_weights_leave_the_gpu(tmp_path: Path) -> None:
    convert(AUTOMODEL / "nemotron_d1", tmp_path / "b", "megatron")
    verified(AUTOMODEL / "nemotron_d1", tmp_path / "b", CUDA)  # libraries take what they keep
    gc.collect()
    peaks = []
    for mode in ("whole", "streamed"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        verified(AUTOMODEL / "nemotron_d1", tmp_path / "b", replace(CUDA, mode=mode))
        gc.collect()  # modules refer to each other
        assert torch.cuda.memory_allocated() <= before
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]


def swapped(folder: Path) -> Path:
    """The folder with the halves of its MTP projection exchanged."""
    tensors = dict(golden_tensors("nemotron_d1"))
    name = next(n for n in tensors if n.startswith("mtp") and n.endswith("eh_proj.weight"))
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)
    return hf_folder(folder, tensors, golden_config("nemotron_d1"))
