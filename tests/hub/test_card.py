"""The model card: what it carries, what it shows, what it must not say, and text from files that stays text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from _push import REPO, converted

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.hub import usage
from mtp_convert.hub.card import CARD, DEPTHS_SVG, ERRORS_SVG, SOURCE_CARD, split_card, table, write_card
from mtp_convert.hub.folder import VERIFIED, prepare
from mtp_convert.hub.verified import Verified, from_json, read_verified
from mtp_convert.verify.result import LogitScores, PlaceError, Section, SideFacts, Verification

SOURCE = """---
license: other
license_name: open-model
license_link: LICENSE.txt
language: [en, de]
pipeline_tag: text-generation
base_model: org/base
tags: [mtp, ours]
extra_gated_prompt: Agree?
model-index:
- name: m
  results:
  - task: {type: text-generation}
    metrics: [{type: accuracy, value: 98.7}]
---
# The best model

Scores 98.7 on everything.
"""
PLACE = PlaceError("layers.0", 1e-6, 1e-7, 2.5e-7, 0.999999, 2e-7, 1.6e-6, 3e-7)
RESULT = Verification(
    a=SideFacts("/home/somebody/secret/source", "nemotron_h", "megatron", "torch_dist", {"BF16": 80}, "megatron tree"),
    b=SideFacts("/home/somebody/secret/m", "nemotron_h", "hf", "safetensors", {"BF16": 112}, "transformers 5.23"),
    sections=(Section("names", 112), Section("forward", 9, notes=("n",))),
    places=(PLACE, replace(PLACE, place="mtp.0.block", relative=1.25e-6)),
    scores=(
        LogitScores("logits", 1.5e-9, 1.0, 1.0, (1.459, 1.459)),
        LogitScores("mtp.0.logits", 2.5e-9, 0.9375, 1.0, (1.462, 1.463), (0.723, 0.719)),
    ),
    tokens=(2, 64),
    seconds=12.25,
    environment={
        "torch": "2.13.0",
        "command": "mtp-convert verify /home/somebody/secret/source --report=/home/x/r.html m",
    },
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted folder called `m` to change."""
    made = Path(shutil.copytree(converted("hf"), tmp_path / "m"))
    (made / CARD).write_text(SOURCE)
    return made


def card_of(folder: Path, verified: Verified | None = None) -> tuple[dict[str, object], str, dict[str, bytes]]:
    """Metadata, text and all files of a card."""
    record = json.loads((folder / "mtp_convert.json").read_text())
    files = write_card(open_checkpoint(folder), record, verified or Verified(), REPO).files
    text = files[CARD].decode()
    return yaml.safe_load(text.split("---\n")[1]), text, files


def test_metadata_comes_from_the_source(folder: Path) -> None:
    meta, _, _ = card_of(folder)
    for name, value in yaml.safe_load(SOURCE.split("---\n")[1]).items():
        if name not in ("model-index", "tags"):
            assert meta[name] == value
    assert meta["library_name"] == "transformers"
    assert meta["tags"] == ["mtp", "ours", "multi-token-prediction", "mtp-convert"]


def test_claims_of_the_source_are_not_ours(folder: Path) -> None:
    meta, text, files = card_of(folder)
    assert "98.7" not in text
    assert "model-index" not in meta
    assert "best model" not in text
    assert files[SOURCE_CARD] == SOURCE.encode()
    assert f"]({SOURCE_CARD})" in text


def test_what_it_says_of_the_conversion(folder: Path) -> None:
    _, text, _ = card_of(folder)
    record = json.loads((folder / "mtp_convert.json").read_text())
    for words in (
        "1 Multi-Token Prediction depth",
        f"mtp-convert {record['version']}",
        record["provenance_digest"],
        "`mtp-convert convert megatron OUT --to hf`",
        "mtp-convert convert CHECKPOINT SOURCE --to megatron",
        f'vllm serve {REPO} --speculative-config \'{{"method": "mtp", "num_speculative_tokens": 1}}\'',
        "Not measured",
        "None of these commands was run",
    ):
        assert words in text
    c = open_checkpoint(folder)
    depth = c.family.depth_tensors(c.layout, c.dims, 0)
    assert f"| 0 | {len(depth)} | " in text


def test_a_megatron_folder_has_its_own_commands() -> None:
    _, text, files = card_of(converted("megatron"))
    assert "--use-checkpoint-args" in text
    assert "written for | Megatron-Core 0.19" in text
    assert SOURCE_CARD not in files
    assert "](hf/README.md)" in text


def test_a_card_of_ours_is_no_source_card(folder: Path) -> None:
    _, first, _ = card_of(folder)
    (folder / CARD).write_text(first)
    _, second, files = card_of(folder)
    assert SOURCE_CARD not in files
    assert yaml.safe_load(second.split("---\n")[1]) == yaml.safe_load(first.split("---\n")[1])


def test_the_last_verification_is_shown(folder: Path) -> None:
    (folder / VERIFIED).write_text(json.dumps(RESULT.to_json()))
    verified = read_verified(folder / VERIFIED, folder)
    _, text, files = card_of(folder, verified)
    for words in (
        "**PASS**",
        "1.3e-06",
        "mtp.0.block",
        "2.5e-09",
        "93.7%",
        "72.3% / 71.9%",
        "1.46 / 1.46",
        "torch 2.13.0",
    ):
        assert words in text, words
    for name in (ERRORS_SVG, DEPTHS_SVG):
        assert files[name].startswith(b"<svg")
        assert f"]({name})" in text
    assert "Not measured" not in text


def test_places_on_somebodys_disk_are_not_published(folder: Path) -> None:
    (folder / VERIFIED).write_text(json.dumps(RESULT.to_json()))
    files = prepare(folder, REPO, card=True, force=False).files
    for file in files.values():
        assert b"somebody" not in (file.source if isinstance(file.source, bytes) else file.source.read_bytes())
    assert "mtp-convert verify source --report=r.html m" in json.loads(files[VERIFIED].source)["environment"]["command"]  # type: ignore[arg-type]


def test_the_result_is_read_back_whole() -> None:
    assert from_json(json.loads(json.dumps(RESULT.to_json()))) == RESULT


def test_a_result_about_another_folder_is_left_out(folder: Path) -> None:
    other = replace(RESULT, b=replace(RESULT.b, path="elsewhere"))
    (folder / VERIFIED).write_text(json.dumps(other.to_json()))
    verified = read_verified(folder / VERIFIED, folder)
    assert verified.result is None
    assert "not about m" in verified.notes[0]


def test_a_failed_verification_stops_the_push(folder: Path) -> None:
    bad = replace(RESULT, sections=(Section("names", 1, problems=(_problem(),)),))
    (folder / VERIFIED).write_text(json.dumps(bad.to_json()))
    with pytest.raises(ConvertError) as error:
        prepare(folder, REPO, card=True, force=False)
    assert (error.value.code, error.value.exit_code) == ("MTP030", 5)
    forced = prepare(folder, REPO, card=True, force=True).files[CARD].source
    assert b"**FAIL**" in forced  # type: ignore[operator]


def _problem() -> object:
    from mtp_convert.errors import Problem

    return Problem("a tensor is missing")


@pytest.mark.parametrize("raw", ["[]", "{}", '{"a": 1}', "nonsense"])
def test_a_file_that_is_no_result(folder: Path, raw: str) -> None:
    (folder / VERIFIED).write_text(raw)
    with pytest.raises(ConvertError) as error:
        read_verified(folder / VERIFIED, folder)
    assert error.value.code == "MTP061"


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\njust text\n---\n", "---\nlicense: mit\n"])
def test_metadata_that_is_none(text: str) -> None:
    with pytest.raises(ConvertError) as error:
        split_card(text, CARD)
    assert error.value.code == "MTP060"


def test_no_license_is_said(folder: Path) -> None:
    (folder / CARD).unlink()
    notes = prepare(folder, REPO, card=True, force=False).notes
    assert any("no license" in n for n in notes)


def test_without_a_card_the_readme_goes_as_it_is(folder: Path) -> None:
    files = prepare(folder, REPO, card=False, force=False).files
    assert files[CARD].source == folder / CARD
    assert SOURCE_CARD not in files


def test_text_of_files_stays_text() -> None:
    row = table(["x"], [["a|b\n# <script>`![x](y)"]]).splitlines()[2]
    assert row == r"| a\|b\n# \<script\>\`!\[x\](y) |".replace(r"\n", r"\\n")
    assert usage.linked("org/m`](javascript:x)") == "`org/m'](javascript:x)`"
    commit = "0123456789" * 4
    assert usage.linked(f"org/m@{commit}") == f"[`org/m@{commit}`](https://huggingface.co/org/m/tree/{commit})"
