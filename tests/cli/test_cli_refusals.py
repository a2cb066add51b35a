"""Refusals: the right exit code, a line that names the culprit, a hint, no traceback, and nothing on disk."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from _damage import CASES, NAME, add, evil_metadata, with_tensors
from _kit import AUTOMODEL, MEGATRON, Cli, Outcome, convert, golden_config, golden_tensors, hf_folder
from safetensors.torch import load_file

SOURCE = AUTOMODEL / NAME
NAMES = tuple(golden_tensors(NAME))


def refused(got: Outcome, code: int, error: str, *says: str) -> None:
    """One refusal, as the user sees it."""
    assert got.code == code, got
    assert re.match(rf"error\[{error}\d*\]: ", got.err), got.err
    assert "Traceback" not in got.err
    assert re.search(r"^hint: \S", got.err, re.MULTILINE), got.err
    assert got.out == ""
    for text in says:
        assert text in got.err


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("name", CASES)
def test_damaged_source(name: str, cli: Cli, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "in").mkdir()
    source = case.make(tmp_path / "in")
    before = everything(tmp_path)
    refused(cli("hf-to-megatron", source, tmp_path / "out"), case.code, case.error, *case.says)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_any_missing_tensor_is_named(name: str, cli: Cli, tmp_path: Path) -> None:
    source = with_tensors(lambda t: t.__delitem__(name))(tmp_path)
    refused(cli("hf-to-megatron", source, tmp_path / "out"), 4, "MTP022", f"{name} is not stored")
    assert not (tmp_path / "out").exists()


def test_all_problems_at_once(cli: Cli, tmp_path: Path) -> None:
    gone = [n for n in NAMES if ".q_proj." in n or ".gate.weight" in n]
    source = hf_folder(
        tmp_path / "src", {n: t for n, t in golden_tensors(NAME).items() if n not in gone}, golden_config(NAME)
    )
    got = cli("inspect", source)
    refused(got, 4, "MTP022", *gone)
    assert len(gone) > 3


def test_extra_tensor_can_be_left_behind(cli: Cli, tmp_path: Path) -> None:
    source = add("backbone.layers.1.mixer.rotary")(tmp_path)
    got = cli("hf-to-megatron", source, tmp_path / "out", "--allow-unmapped")
    assert got.code == 0
    assert "1 stored tensors are not part of nemotron_h and stay behind" in got.out
    assert "backbone.layers.1.mixer.rotary" in cli("inspect", source, "--allow-unmapped").out
    record = (tmp_path / "out" / "mtp_convert.json").read_text()
    assert "backbone.layers.1.mixer.rotary" in record


class TestTorchDist:
    """Megatron folders from strangers."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A converted model to damage."""
        convert(SOURCE, tmp_path / "src", "megatron")
        return tmp_path / "src" / "release"

    def test_pickle_that_runs_a_command(self, folder: Path, cli: Cli, tmp_path: Path) -> None:
        evil_metadata(folder, tmp_path / "marker")
        before = everything(tmp_path)
        refused(cli("megatron-to-hf", folder.parent, tmp_path / "out"), 3, "MTP014", "system", ".metadata")
        assert everything(tmp_path) == before

    def test_truncated_payload(self, folder: Path, cli: Cli, tmp_path: Path) -> None:
        os.truncate(folder / "__0_0.distcp", 100_000)
        got = cli("megatron-to-hf", folder.parent, tmp_path / "out")
        refused(got, 3, "MTP013", "__0_0.distcp", "truncated")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "file",
        ["__0_0.distcp", ".metadata"],
    )
    def test_missing_file(self, file: str, folder: Path, cli: Cli, tmp_path: Path) -> None:
        (folder / file).unlink()
        refused(cli("megatron-to-hf", folder.parent, tmp_path / "out"), 3, "MTP0", file)

    def test_tracker_to_nowhere(self, folder: Path, cli: Cli, tmp_path: Path) -> None:
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("12")
        refused(cli("megatron-to-hf", folder.parent, tmp_path / "out"), 3, "MTP013", "iter_0000012")

    def test_no_config(self, cli: Cli, tmp_path: Path) -> None:
        got = cli("megatron-to-hf", MEGATRON / "hyb_m" / "ckpt", tmp_path / "out")
        refused(got, 4, "MTP020", "config.json", "--hf-config")

    def test_legacy_without_config(self, cli: Cli, tmp_path: Path) -> None:
        got = cli("megatron-to-hf", MEGATRON / "hyb_m" / "legacy", tmp_path / "out")
        refused(got, 4, "MTP020", "config.json", "--hf-config")

    def test_config_of_another_model(self, cli: Cli, tmp_path: Path) -> None:
        other = AUTOMODEL / "nemotron_packed" / "config.json"
        got = cli("megatron-to-hf", MEGATRON / "hyb_m" / "ckpt", tmp_path / "out", "--hf-config", other)
        refused(got, 4, "MTP022", "decoder.layers.2.pre_mlp_layernorm.weight")


class TestPlaces:
    """Outputs that cannot be."""

    def test_existing_output(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        refused(cli("hf-to-megatron", SOURCE, tmp_path / "out"), 73, "MTP073", str(tmp_path / "out"), "--force")
        assert everything(tmp_path) == ["out", "out/precious"]
        assert cli("hf-to-megatron", SOURCE, tmp_path / "out", "--force").code == 0
        assert not (tmp_path / "out" / "precious").exists()

    @pytest.mark.parametrize("relative", ["", "out", "deep/down/out", "../src/out", ".."])
    def test_output_in_or_around_the_source(self, relative: str, cli: Cli, tmp_path: Path) -> None:
        source = Path(shutil.copytree(SOURCE, tmp_path / "around" / "src"))
        before = everything(tmp_path)
        refused(cli("hf-to-megatron", source, source / relative, "--force"), 2, "MTP001", "overlap")
        assert everything(tmp_path) == before

    def test_output_in_the_source_through_a_link(self, cli: Cli, tmp_path: Path) -> None:
        source = Path(shutil.copytree(SOURCE, tmp_path / "src"))
        (tmp_path / "link").symlink_to(source)
        refused(cli("hf-to-megatron", source, tmp_path / "link" / "out"), 2, "MTP001", "overlap")

    @pytest.mark.parametrize("relative", ["out", "deep/out"])
    def test_parent_is_a_file(self, relative: str, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused(cli("hf-to-megatron", SOURCE, tmp_path / "file" / relative), 6, "MTP040", str(tmp_path / "file"))
        assert everything(tmp_path) == ["file"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_parent_is_not_writable(self, cli: Cli, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        refused(cli("hf-to-megatron", SOURCE, tmp_path / "out"), 6, "MTP040", "ermission")

    def test_name_too_long(self, cli: Cli, tmp_path: Path) -> None:
        refused(cli("hf-to-megatron", SOURCE, tmp_path / ("x" * 300)), 6, "MTP040")

    def test_wrong_direction(self, cli: Cli, tmp_path: Path) -> None:
        convert(SOURCE, tmp_path / "m", "megatron")
        hint = "mtp-convert convert"
        refused(cli("hf-to-megatron", tmp_path / "m", tmp_path / "o"), 2, "MTP003", "got megatron", "expected hf", hint)
        refused(cli("megatron-to-hf", SOURCE, tmp_path / "o"), 2, "MTP003", "got hf", "expected megatron", hint)


def test_tied_copy_that_differs(cli: Cli, tmp_path: Path) -> None:
    tensors = dict(golden_tensors(NAME))
    source = hf_folder(tmp_path / "src", tensors, golden_config(NAME, tie_word_embeddings=True))
    gap = (tensors["lm_head.weight"] - tensors["backbone.embeddings.weight"]).abs().max()
    got = cli("hf-to-megatron", source, tmp_path / "out")
    refused(got, 4, "MTP026", "lm_head.weight", f"max difference {gap:.3g}", "tie_word_embeddings")


def test_unequal_depths(cli: Cli, tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_packed"
    got = cli("fold", source, tmp_path / "one")
    refused(got, 4, "MTP027", "mtp.layers.2.enorm.weight", "max difference", "--force-fold mean")
    assert cli("fold", source, tmp_path / "one", "--force-fold", "first").code == 0
    assert cli("unfold", tmp_path / "one", tmp_path / "two", "--depths", "2").code == 0
    given, found = (load_file(f / "model.safetensors") for f in (source, tmp_path / "two"))
    assert given.keys() == found.keys()
    assert torch.equal(found["mtp.layers.2.enorm.weight"], given["mtp.layers.0.enorm.weight"])
