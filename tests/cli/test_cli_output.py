"""What is printed: one JSON object, or text for people, or nothing; never an escape sequence from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, MEGATRON, TINY, Cli, Outcome, convert, golden_config, golden_tensors, hf_folder

NAME = "nemotron_d1"
SOURCE = AUTOMODEL / NAME
ESCAPE = "\x1b[31m"
ARGS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "hf-to-megatron": lambda t: ("hf-to-megatron", SOURCE, t / "out"),
    "megatron-to-hf": lambda t: ("megatron-to-hf", t / "m", t / "out"),
    "convert": lambda t: ("convert", SOURCE, t / "out", "--to", "hf"),
    "dry run": lambda t: ("convert", SOURCE, t / "out", "--to", "megatron", "--dry-run"),
    "plan": lambda t: ("plan", SOURCE, "--to", "megatron"),
    "plan back": lambda t: ("plan", t / "m", "--to", "hf"),
    "inspect": lambda t: ("inspect", SOURCE),
    "inspect megatron": lambda t: ("inspect", t / "m"),
    "roundtrip": lambda t: ("roundtrip", SOURCE),
    "roundtrip megatron": lambda t: ("roundtrip", t / "m"),
    "diff": lambda t: ("diff", SOURCE, t / "m"),
    "check": lambda t: ("check", t / "m"),
    "fold": lambda t: ("fold", SOURCE, t / "out"),
    "unfold": lambda t: ("unfold", SOURCE, t / "out", "--depths", "2"),
    "families": lambda t: ("families",),
}
FAILING: dict[str, tuple[Callable[[Path], tuple[object, ...]], int]] = {
    "diff": (lambda t: ("diff", SOURCE, AUTOMODEL / "nemotron_d2_rep"), 5),
    "check": (lambda t: ("check", damaged(t / "m")), 3),
}


def damaged(folder: Path) -> Path:
    path = folder / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """With a Megatron folder `m`."""
    convert(SOURCE, tmp_path / "m", "megatron")
    return tmp_path


@pytest.mark.parametrize("name", ARGS)
def test_json(name: str, cli: Cli, scratch: Path) -> None:
    got = cli(*ARGS[name](scratch), "--format", "json")
    assert (got.code, got.err) == (0, "")
    assert got.data["schema_version"] == 1


@pytest.mark.parametrize("name", FAILING)
def test_json_of_a_failed_check(name: str, cli: Cli, scratch: Path) -> None:
    make, code = FAILING[name]
    got = cli(*make(scratch), "--format", "json")
    assert (got.code, got.err) == (code, "")
    assert got.data["schema_version"] == 1


def test_json_of_an_error(cli: Cli, tmp_path: Path) -> None:
    """Errors are text on stderr; stdout stays empty, so a reader never parses half a result."""
    got = cli("inspect", tmp_path / "nowhere", "--format", "json")
    assert (got.code, got.out) == (3, "")
    assert got.err.startswith("error[MTP002]")


@pytest.mark.parametrize("name", ARGS)
def test_quiet(name: str, cli: Cli, scratch: Path) -> None:
    assert cli(*ARGS[name](scratch), "--format", "quiet") == Outcome(0, "", "")


def test_quiet_still_tells_errors(cli: Cli, tmp_path: Path) -> None:
    got = cli("inspect", tmp_path / "nowhere", "--format", "quiet")
    assert (got.code, got.out) == (3, "")
    assert got.err.startswith("error[MTP002]")


@pytest.mark.parametrize("name", ARGS)
def test_human_has_no_colour_in_a_pipe(name: str, cli: Cli, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    got = cli(*ARGS[name](scratch))
    assert (got.code, got.err) == (0, "")
    assert got.out.strip()
    assert "\x1b" not in got.out


class TestInspect:
    """Facts from headers."""

    def test_hf(self, cli: Cli) -> None:
        found = cli("inspect", AUTOMODEL / "nemotron_mtpM", "--format", "json").data
        assert (found["family"], found["layout"], found["container"]) == ("nemotron_h", "hf", "safetensors")
        assert (found["mtp_stored_depths"], found["mtp_steps"], found["mtp_repeated_layer"]) == (2, 2, False)
        tensors = golden_tensors("nemotron_mtpM")
        assert found["tensors"] == len(tensors)
        assert found["mtp_tensors"] == sum(n.startswith("mtp.") for n in tensors)
        assert found["nbytes"] == sum(t.nbytes for t in tensors.values())
        assert found["dtypes"] == {"F32": len(tensors)}

    def test_megatron(self, cli: Cli, scratch: Path) -> None:
        for path in (scratch / "m", scratch / "m" / "release"):
            found = cli("inspect", path, "--format", "json").data
            assert (found["layout"], found["container"]) == ("megatron", "torch_dist")
            assert (found["mtp_stored_depths"], found["objects"] > 20) == (1, True)

    def test_megatron_without_config(self, cli: Cli) -> None:
        found = cli("inspect", MEGATRON / "hyb_rep" / "ckpt", "--hf-config", MEGATRON / "hyb_rep", "--format", "json")
        assert found.data["left_behind"] == ["common_state/shard_0_1"]

    def test_human(self, cli: Cli) -> None:
        got = cli("inspect", TINY).out
        for text in ("nemotron_h", "1 stored depth", "MTP heads", "backbone.embeddings.weight", "BF16"):
            assert text in got


class TestPlan:
    """Every tensor's origin."""

    def test_there(self, cli: Cli) -> None:
        steps = {s["tensor"]: s for s in cli("plan", SOURCE, "--to", "megatron", "--format", "json").data["steps"]}
        qkv = steps["decoder.layers.1.self_attention.linear_qkv.weight"]
        assert qkv["sources"] == [f"backbone.layers.1.mixer.{p}_proj.weight" for p in "qkv"]
        assert (qkv["op"], qkv["shape"]) == ("fuse 3", [64, 32])
        assert steps["mtp.layers.0.eh_proj.weight"]["op"] == "copy"
        assert steps["mtp.layers.0.mtp_model_layer.layers.1.mlp.experts.experts.linear_fc1.weight"]["op"] == "stack 8"

    def test_back(self, cli: Cli, scratch: Path) -> None:
        found = cli("plan", scratch / "m", "--to", "hf", "--format", "json").data
        assert {s["tensor"] for s in found["steps"]} == set(golden_tensors(NAME))
        assert found["nbytes"] == (SOURCE / "model.safetensors").stat().st_size

    def test_bytes_are_what_is_written(self, cli: Cli, scratch: Path) -> None:
        found = cli("plan", SOURCE, "--to", "megatron", "--format", "json").data
        assert found["nbytes"] == (scratch / "m" / "release" / "__0_0.distcp").stat().st_size


class TestDiff:
    """Across layouts."""

    def test_equal(self, cli: Cli, scratch: Path) -> None:
        got = cli("diff", SOURCE, scratch / "m")
        assert (got.code, "equal" in got.out) == (0, True)

    def test_different_param_is_named(self, cli: Cli, scratch: Path) -> None:
        tensors = {n: t.clone() for n, t in golden_tensors(NAME).items()}
        tensors["mtp.layers.0.mixer.k_proj.weight"][3, 5] += 0.5
        other = hf_folder(scratch / "other", tensors, golden_config(NAME))
        got = cli("diff", scratch / "m", other, "--format", "json")
        assert (got.code, got.data["equal"]) == (5, False)
        (row,) = got.data["differing"]
        assert row["param"] == "mtp.0.layers.0.k"
        assert row["max_abs"] == pytest.approx(0.5)
        assert row["b"] == "mtp.layers.0.mixer.k_proj.weight"
        assert "mtp.0.layers.0.k" in cli("diff", scratch / "m", other).out

    def test_other_type_with_other_values(self, cli: Cli, scratch: Path) -> None:
        convert(SOURCE, scratch / "half", "hf", dtype="bf16")
        got = cli("diff", SOURCE, scratch / "half", "--format", "json")
        assert got.code == 5
        assert got.data["dtypes"]

    def test_other_number_of_depths(self, cli: Cli, scratch: Path) -> None:
        convert(SOURCE, scratch / "two", "hf", depths=2)
        got = cli("diff", scratch / "m", scratch / "two", "--format", "json")
        assert got.code == 5
        assert got.data["only_a"] == []
        assert all(n.startswith("mtp.1.") for n in got.data["only_b"])
        assert len(got.data["only_b"]) > 10


class TestCheck:
    """The output against its own record."""

    def test_damage_is_named(self, cli: Cli, scratch: Path) -> None:
        got = cli("check", damaged(scratch / "m"))
        assert got.code == 3
        assert "release/__0_0.distcp has other content than recorded" in got.out

    def test_missing_file_is_named(self, cli: Cli, scratch: Path) -> None:
        (scratch / "m" / "release" / "__0_0.distcp").unlink()
        got = cli("check", scratch / "m")
        assert got.code == 3
        assert "release/__0_0.distcp is missing" in got.out

    def test_foreign_folder(self, cli: Cli) -> None:
        got = cli("check", SOURCE)
        assert (got.code, got.err[:13]) == (3, "error[MTP002]")


class TestEscapes:
    """Text from files is shown, never obeyed."""

    def test_tensor_name(self, cli: Cli, tmp_path: Path) -> None:
        tensors = {**golden_tensors(NAME), f"evil{ESCAPE}\r\n": torch.ones(1)}
        got = cli("inspect", hf_folder(tmp_path / "src", tensors, golden_config(NAME)), "--allow-unmapped")
        self.shown_escaped(got)

    def test_model_type(self, cli: Cli, tmp_path: Path) -> None:
        source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME, model_type=f"x{ESCAPE}y"))
        self.shown_escaped(cli("inspect", source))

    def test_block_kind(self, cli: Cli, tmp_path: Path) -> None:
        config = golden_config(NAME, layers_block_type=[f"x{ESCAPE}y"])
        self.shown_escaped(cli("inspect", hf_folder(tmp_path / "src", golden_tensors(NAME), config)))

    def test_folder_name(self, cli: Cli, tmp_path: Path) -> None:
        source = hf_folder(tmp_path / f"x{ESCAPE}y", golden_tensors(NAME), golden_config(NAME))
        self.shown_escaped(cli("inspect", source))
        self.shown_escaped(cli("plan", source, "--to", "megatron"))
        self.shown_escaped(cli("diff", source, SOURCE))

    def test_folder_name_in_the_next_command(self, cli: Cli, tmp_path: Path) -> None:
        source = hf_folder(tmp_path / f"x{ESCAPE}y", golden_tensors(NAME), golden_config(NAME))
        self.shown_escaped(cli("hf-to-megatron", source, tmp_path / "out"))
        self.shown_escaped(cli("hf-to-megatron", SOURCE, tmp_path / f"out{ESCAPE}y"))
        self.shown_escaped(cli("check", tmp_path / f"out{ESCAPE}y"))

    def test_side_file_in_an_index(self, cli: Cli, tmp_path: Path) -> None:
        source = hf_folder(tmp_path / "src", golden_tensors(NAME), golden_config(NAME))
        index = {"weight_map": {"lm_head.weight": f"x{ESCAPE}y.safetensors"}}
        (source / "model.safetensors").rename(source / "model-1.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        self.shown_escaped(cli("inspect", source))

    @staticmethod
    def shown_escaped(got: Outcome) -> None:
        assert "\x1b" not in got.out + got.err
        assert "\r" not in got.out + got.err
        assert "\\x1b" in got.out + got.err, got


def test_families(cli: Cli) -> None:
    got = cli("families")
    assert got.code == 0
    assert "nemotron_h" in got.out
    assert "megatron in torch_dist or legacy" in got.out
    rows = {f["name"]: f for f in cli("families", "--format", "json").data["families"]}
    family = rows["nemotron_h"]
    assert {"hf", "megatron"} <= set(family["layouts"])
    assert family["containers"]["megatron"] == ["torch_dist", "legacy"]
    assert family["read"] == ["dcp"]
    assert "automodel" in family["variants"]["native"]
    assert family["megatron_since"] == "0.17"
    assert family["bridge_provider"].endswith(".HybridModelProvider")
    assert (family["depth_field"], family["released_depths"]) == ("num_nextn_predict_layers", [0, 1])
    assert rows["deepseek_v4"]["released_encodings"] == ["fp8", "mxfp4"]
    assert rows["minimax_m3"]["wrappers"] == ["minimax_m3_vl"]
    assert rows["minimax_m3"]["nested"]
    assert not rows["deepseek_v3"]["nested"]


def test_env(cli: Cli) -> None:
    got = cli("env")
    assert got.code == 0
    assert "torch " in got.out


def test_demo(cli: Cli) -> None:
    got = cli("demo")
    assert got.code == 0
    assert got.out.count("drafts accepted") == 3
    assert "the conversion is exact, both ways" in got.out
    assert "FAIL" not in got.out
