"""Golden models through the converter: the same bytes come back, and the other side computes the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, HF_NAMES, MEGATRON, MEGATRON_NAMES, TINY, convert, differing, there_and_back
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.models.megatron.language_model import Prediction
from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip
from mtp_convert.verify.forward import predict, relative_error, run_hf, run_megatron

TOLERANCE = 2e-4
SOURCES = [*(AUTOMODEL / n for n in HF_NAMES), TINY]
FORWARD = [("nemotron_d1", None), ("nemotron_d2_rep", 2), ("nemotron_mtpM", None)]


@dataclass
class Report:
    """Collects errors; prints the worst (seen with -rP)."""

    errors: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, actual: Tensor, expected: Tensor) -> None:
        self.errors[name] = relative_error(actual, expected)

    def check(self, what: str) -> None:
        print(what, " ".join(f"{n}={e:.1e}" for n, e in self.errors.items()))
        assert self.errors
        assert max(self.errors.values()) < TOLERANCE, self.errors


def megatron_forward(folder: Path, ids: Tensor) -> Prediction:
    """Megatron's own names and arguments, nothing else."""
    return predict(open_checkpoint(folder).stored, ids)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_hf_files_come_back(source: Path, tmp_path: Path) -> None:
    _, back = there_and_back(source, tmp_path)
    assert differing(source, back) == []
    assert roundtrip(open_checkpoint(source), Options("megatron")).ok


@pytest.mark.parametrize("name", MEGATRON_NAMES)
def test_megatron_tensors_come_back(name: str) -> None:
    source = open_checkpoint(MEGATRON / name / "ckpt", hf_config=MEGATRON / name / "config.json")
    result = roundtrip(source, Options("hf"))
    assert result.ok, result


@pytest.mark.parametrize(("name", "steps"), FORWARD, ids=[n for n, _ in FORWARD])
def test_megatron_side_agrees_with_automodel(name: str, steps: int | None, tmp_path: Path) -> None:
    io = load_file(AUTOMODEL / name / "io.safetensors")
    result = convert(AUTOMODEL / name, tmp_path / "there", "megatron", steps=steps)
    assert (result.steps, result.repeated) == ((2, True) if steps else (result.physical, False))
    out = megatron_forward(tmp_path / "there", io["input_ids"])
    report = Report()
    report.add("logits", out.logits, io["logits"])
    report.add("hidden", out.hidden, io["last_hidden"])
    assert len(out.mtp_hidden) == sum(n.startswith("mtp_logits.") for n in io)
    for k, (hidden, logits) in enumerate(zip(out.mtp_hidden, out.mtp_logits, strict=True)):
        report.add(f"mtp_hidden.{k}", hidden, io[f"mtp_per_depth_h.{k}"])
        report.add(f"mtp_logits.{k}", logits, io[f"mtp_logits.{k}"])
    report.check(name)


def test_packed_sequences_agree_one_by_one(tmp_path: Path) -> None:
    """A packed row holds independent sequences; its last tokens (index 0) pad it and mean nothing."""
    source = AUTOMODEL / "nemotron_packed"
    io = load_file(source / "io.safetensors")
    convert(source, tmp_path / "there", "megatron")
    index, report = io["seq_idx"][0], Report()
    for sequence in range(1, int(index.max()) + 1):
        at = (index == sequence).nonzero().flatten()
        out = megatron_forward(tmp_path / "there", io["input_ids"][:, at])
        report.add(f"{sequence}.logits", out.logits, io["logits"][:, at])
        report.add(f"{sequence}.hidden", out.hidden, io["last_hidden"][:, at])
        for k in range(len(out.mtp_hidden)):
            inside = slice(len(at) - k - 1)  # later positions see tokens beyond the sequence
            report.add(
                f"{sequence}.mtp_hidden.{k}", out.mtp_hidden[k][:, inside], io[f"mtp_per_depth_h.{k}"][:, at][:, inside]
            )
            report.add(
                f"{sequence}.mtp_logits.{k}", out.mtp_logits[k][:, inside], io[f"mtp_logits.{k}"][:, at][:, inside]
            )
    report.check("nemotron_packed")


@pytest.mark.skip(reason="megatron-core scores router groups by another rule than AutoModel (golden README)")
def test_latent_groups_agree_with_automodel() -> None: ...


@torch.no_grad()
def test_trained_fixture_agrees_on_text(tmp_path: Path) -> None:
    text = (TINY.parent / "text" / "heldout.txt").read_bytes()[: 2 * 96]
    ids = torch.tensor(list(text)).view(2, 96)
    there, back = there_and_back(TINY, tmp_path)
    expected, report = run_hf(TINY, ids), Report()
    for side, out in (("megatron", run_megatron(open_checkpoint(there).stored, ids)), ("back", run_hf(back, ids))):
        report.add(f"{side}.logits", out.logits, expected.logits)
        report.add(f"{side}.mtp_logits", out.mtp_logits[0], expected.mtp_logits[0])
        assert out.acceptance() == pytest.approx(expected.acceptance(), abs=0.011)
    report.check("tiny-nemotron-h")


@torch.no_grad()
@pytest.mark.parametrize("name", ["hyb_m", "hyb_rep", "hyb_mtpM"])
def test_hf_side_agrees_with_megatron_core(name: str, tmp_path: Path) -> None:
    source = MEGATRON / name
    io = load_file(source / "out.safetensors")
    convert(source / "ckpt", tmp_path / "hf", "hf", hf_config=source / "config.json")
    steps = sum(n.startswith("logits_mtp") for n in io)
    model = NemotronHForCausalLM.from_pretrained(
        tmp_path / "hf", num_nextn_predict_layers=steps, mtp_use_repeated_layer=name == "hyb_rep"
    )
    model.compute_mtp_in_eval = True
    out = model(io["tokens"], output_hidden_states=True)
    report = Report()
    report.add("logits", out.logits, io["logits"])
    report.add("hidden", out.hidden_states[0], io["hidden"])
    assert len(out.mtp_per_depth_h) == steps
    for k, hidden in enumerate(out.mtp_per_depth_h):
        report.add(f"mtp_hidden.{k}", hidden, io[f"hidden_mtp{k}"])
        report.add(f"mtp_logits.{k}", model.logits(hidden), io[f"logits_mtp{k}"])
    report.check(name)


@pytest.mark.parametrize("name", MEGATRON_NAMES)
def test_megatron_side_survives_both_ways(name: str, tmp_path: Path) -> None:
    """Through Hugging Face and back, with our own training arguments, the numbers are still megatron-core's."""
    source = MEGATRON / name
    io = load_file(source / "out.safetensors")
    steps = sum(n.startswith("logits_mtp") for n in io)
    convert(source / "ckpt", tmp_path / "hf", "hf", hf_config=source / "config.json")
    convert(tmp_path / "hf", tmp_path / "there", "megatron", steps=steps)
    out = megatron_forward(tmp_path / "there", io["tokens"])
    report = Report()
    report.add("logits", out.logits, io["logits"])
    for k in range(steps):
        report.add(f"mtp_hidden.{k}", out.mtp_hidden[k], io[f"hidden_mtp{k}"])
        report.add(f"mtp_logits.{k}", out.mtp_logits[k], io[f"logits_mtp{k}"])
    report.check(name)
