"""`verify` on real checkpoints: every golden folder, folds, other containers, and what it says when sides differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from _kit import AUTOMODEL, MEGATRON, TINY, Cli, convert, golden_config, golden_tensors, hf_folder

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.verify.options import VerifyOptions
from mtp_convert.verify.result import Verification
from mtp_convert.verify.run import verify

SHORT = VerifyOptions(rows=1, length=16)
FOLDERS = (
    "nemotron_d1",
    "nemotron_d2_rep",
    "nemotron_mtpM",
    "nemotron_packed",
    "dsv4_d1",
    "dsv4_mtpratio4",
    "dsv4_pad",
)


def verified(a: Path, b: Path, options: VerifyOptions = SHORT, hf_config: Path | None = None) -> Verification:
    return verify(open_checkpoint(a), open_checkpoint(b, hf_config=hf_config), options)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_folders_and_their_conversions(name: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / name, tmp_path / "b", "megatron")
    found = verified(AUTOMODEL / name, tmp_path / "b")
    assert found.ok, [s.problems for s in found.sections]
    assert {p.place.split(".")[0] for p in found.places} == {"embedding", "layers", "final_norm", "logits", "mtp"}
    assert found.a.backend != found.b.backend


def test_groups_that_the_stacks_score_differently_are_seen(tmp_path: Path) -> None:
    """transformers takes the best two experts of a group, Megatron-Core the best topk / groups (golden README)."""
    name = "nemotron_latent_groups"
    said = convert(AUTOMODEL / name, tmp_path / "b", "megatron").notes
    assert any("scores a group of experts" in note for note in said)
    found = verified(AUTOMODEL / name, tmp_path / "b")
    assert not found.ok
    assert found.section("bits").ok
    assert found.culprit is not None
    assert any("experts" in t for t in found.culprit.a)
    assert {p.place for p in found.places if not p.ok} == {"layers.2", "layers.5", "mtp.0.block", "mtp.1.block"}


@pytest.mark.parametrize("name", ["hyb_m", "hyb_rep", "qwen2_te", "dsv3_te", "dsv4_dev"])
def test_golden_megatron_checkpoints_and_what_they_become(name: str, tmp_path: Path) -> None:
    source = next((MEGATRON / name).glob("*/iter_*"))
    config = MEGATRON / name / "config.json"
    convert(source, tmp_path / "hf", "hf", hf_config=config if config.exists() else None)
    found = verify(
        open_checkpoint(source, hf_config=config if config.exists() else None), open_checkpoint(tmp_path / "hf"), SHORT
    )
    assert found.ok, [s.problems for s in found.sections]


def test_a_repeated_layer_equals_its_unfolded_depths(tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_d2_rep"
    convert(source, tmp_path / "repeated", "megatron", steps=2)
    convert(source, tmp_path / "unfolded", "megatron", depths=2)
    for a, b in ((source, "repeated"), (tmp_path / "repeated", "unfolded"), (tmp_path / "unfolded", "repeated")):
        found = verified(a, tmp_path / b)
        assert found.ok, [s.problems for s in found.sections]
        assert [p.place for p in found.places if p.place.endswith("logits")] == [
            "logits",
            "mtp.0.logits",
            "mtp.1.logits",
        ]


def test_another_number_of_depths_is_named(tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_mtpM"
    convert(source, tmp_path / "b", "megatron", depths=0)
    found = verified(source, tmp_path / "b")
    assert not found.ok
    assert "MTP depths" in found.section("names").problems[-1].what
    assert "names" in found.section("forward").skipped


def test_legacy_ranks_against_torch_dist(tmp_path: Path) -> None:
    sizes = {"tensor": 2, "pipeline": 1}
    convert(AUTOMODEL / "nemotron_d1", tmp_path / "a", "megatron", container="legacy", parallel=sizes)
    convert(AUTOMODEL / "nemotron_d1", tmp_path / "b", "megatron")
    assert verified(tmp_path / "a", tmp_path / "b").ok


def test_codes_against_values(tmp_path: Path) -> None:
    """FP8 loses bits: the bits level says so without a verdict, the forward passes see how much it matters."""
    convert(AUTOMODEL / "nemotron_d1", tmp_path / "b", "hf", encoding="fp8-block")
    found = verified(AUTOMODEL / "nemotron_d1", tmp_path / "b")
    assert found.section("bits").ok
    assert "another type or encoding" in found.section("bits").notes[0]
    assert not found.section("forward").ok
    assert 1e-3 < max(p.relative for p in found.places) < 0.2


def test_a_config_that_says_something_else_is_seen(tmp_path: Path) -> None:
    name = "nemotron_d1"
    config = golden_config(name)
    factor = golden_config(name, routed_scaling_factor=2 * float(config["routed_scaling_factor"]))
    hf_folder(tmp_path / "b", golden_tensors(name), factor)
    found = verified(AUTOMODEL / name, tmp_path / "b")
    assert found.section("bits").ok
    assert not found.ok
    assert found.culprit is not None
    assert "configs" in found.culprit.guess


def test_streamed_equals_whole(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "b", "megatron")
    whole, streamed = (verified(TINY, tmp_path / "b", replace(SHORT, mode=m)) for m in ("whole", "streamed"))
    assert whole.places == streamed.places
    assert whole.scores == streamed.scores


def test_quick_runs_a_sample_and_sees_a_mistake(tmp_path: Path) -> None:
    tensors = dict(golden_tensors("nemotron_d1"))
    name = next(n for n in tensors if n.startswith("mtp") and n.endswith("eh_proj.weight"))
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)
    hf_folder(tmp_path / "source", tensors, golden_config("nemotron_d1"))
    convert(tmp_path / "source", tmp_path / "b", "megatron")
    quick = replace(SHORT, quick=True, levels=("forward",))
    found = verified(AUTOMODEL / "nemotron_d1", tmp_path / "b", quick)
    assert [p.place for p in found.places if not p.ok] == ["mtp.0.fused"]
    assert verified(tmp_path / "source", tmp_path / "b", quick).ok


def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    a, b = AUTOMODEL / "nemotron_d1", tmp_path / "b"
    convert(a, b, "megatron")
    outputs = {n: tmp_path / "out" / n for n in ("report.html", "junit.xml", "pictures", "baseline.json")}
    options = [
        "--rows",
        1,
        "--length",
        16,
        "--save",
        "--report",
        outputs["report.html"],
        "--junit",
        outputs["junit.xml"],
    ]
    done = cli("verify", a, b, *options, "--svg", outputs["pictures"], "--write-baseline", outputs["baseline.json"])
    assert done.code == 0, done.err
    assert "Both sides compute the same" in done.out
    assert all(p.exists() for p in outputs.values())
    assert json.loads((b / "mtp_convert_verify.json").read_text())["ok"] is True
    again = cli("verify", a, b, "--rows", 1, "--length", 16, "--format", "json", "--baseline", outputs["baseline.json"])
    assert again.data["ok"] is True
    assert {s["level"] for s in again.data["sections"]} == {"names", "shapes", "bits", "forward"}
    tight = tmp_path / "tight.json"
    tight.write_text('{"schema_version": 1, "places": {"layers.0": 0.0}}')
    refused = cli("verify", a, b, "--rows", 1, "--length", 16, "--format", "quiet", "--baseline", tight)
    assert refused.code == 5


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--levels", "bytes"), 2, "bytes"),
        (("--device", "cuda:77"), 2, "--device"),
        (("--baseline", "none.json"), 3, "none.json"),
        (("--dtype", "int8"), 2, "--dtype"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, words: tuple[str, ...], code: int, text: str) -> None:
    done = cli("verify", AUTOMODEL / "nemotron_d1", AUTOMODEL / "nemotron_d1", *words)
    assert done.code == code
    assert text in done.err


def test_two_families_are_refused(cli: Cli) -> None:
    done = cli("verify", AUTOMODEL / "nemotron_d1", AUTOMODEL / "dsv4_d1")
    assert (done.code, done.out) == (4, "")
    assert "MTP028" in done.err


def test_too_little_memory_is_said_with_a_way_out(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("mtp_convert.verify.parity.judge", full)
    done = cli("verify", AUTOMODEL / "nemotron_d1", AUTOMODEL / "nemotron_d1", "--mode", "whole")
    assert done.code == 4
    assert "MTP032" in done.err
    assert "--mode streamed" in done.err
