"""What names a repository, and which of its files are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtp_convert.errors import ConvertError
from mtp_convert.hub.source import HubName, Needed, needed, parse


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/12", "org/name", "refs/pr/12"),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@0123abcd", "org/name", "0123abcd"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-ai/DeepSeek-V3.1", None),
        ("zai-org/GLM-4.5-Air_x", "zai-org/GLM-4.5-Air_x", None),
    ],
)
def test_names(text: str, repo: str, revision: str | None) -> None:
    assert parse(text) == HubName(repo, revision)
    assert str(HubName(repo, revision)) == text.removeprefix("hf://")


@pytest.mark.parametrize(
    "text",
    [
        *("name", "a/b/c", "/tmp/x", "./out/x", "../x", "~/x", "out/", "a//b", "", "org/name@", "org/na me"),
        *("org/model.safetensors", "org/a--b", "org/a..b", "org/.x", "org/x.", f"org/{'x' * 96}", "https://x/y"),
    ],
)
def test_paths(text: str) -> None:
    assert parse(text) is None


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert parse("org/name") is None
    assert parse("hf://org/name") == HubName("org/name")
    assert parse("org/name@main") == HubName("org/name", "main")


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/c", "hf:///a/b", "hf://org/name@", "hf://org/a..b"])
def test_a_marked_name_must_be_one(text: str) -> None:
    with pytest.raises(ConvertError) as caught:
        parse(text)
    assert caught.value.code == "MTP001"


SIDE = {"config.json": 1, "tokenizer.json": 1, "README.md": 1, "modeling.py": 1}
BESIDE = {"pytorch_model.bin": 9, "original/consolidated.pth": 9, "gguf/q4.gguf": 9, "huge.json": 1 << 40, ".git/x": 1}


def test_of_a_sharded_folder_only_what_the_index_names() -> None:
    files = {**SIDE, **BESIDE, "model.safetensors.index.json": 1, "a.safetensors": 9, "b.safetensors": 9}
    side = tuple(sorted({*SIDE, "model.safetensors.index.json"}))
    assert needed(files, ["b.safetensors"], None) == Needed(("b.safetensors",), side)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_one_file_needs_no_index(name: str) -> None:
    files = {**SIDE, **BESIDE, name: 9, "sub/other.safetensors": 9}
    assert needed(files, (), None) == Needed((name,), tuple(sorted(SIDE)))


def test_the_usual_name_is_preferred() -> None:
    assert needed({"a.safetensors": 1, "model.safetensors": 1}, (), None).weights == ("model.safetensors",)


def test_what_is_kept_for_the_way_back_comes_along() -> None:
    kept = {"weights_layout/a.header": 1, "weights_encoding/model.safetensors": 9}
    assert set(needed({"model.safetensors": 9, **kept}, (), None).side) == set(kept)


@pytest.mark.parametrize(("tracker", "folder"), [("release", "release/"), ("20\n", "iter_0000020/")])
@pytest.mark.parametrize("payload", [".metadata", "mp_rank_00/model_optim_rng.pt"])
def test_of_a_megatron_checkpoint_one_iteration(tracker: str, folder: str, payload: str) -> None:
    weights = {folder + payload: 1, folder + "__0_0.distcp": 9}
    side = {"latest_checkpointed_iteration.txt": 1, "hf/config.json": 1, "hf/tokenizer.json": 1, "mtp_convert.json": 1}
    other = {"iter_0000010/.metadata": 1, "iter_0000010/__0_0.distcp": 9}
    found = needed({**weights, **side, **other}, (), tracker)
    describing = (folder + payload,) if payload == ".metadata" else ()
    assert found == Needed(tuple(sorted(weights)), tuple(sorted(side)), True, describing)


def test_an_iteration_folder_may_be_the_repository() -> None:
    found = needed({".metadata": 1, "__0_0.distcp": 9, "common.pt": 1, "hf/config.json": 1}, (), None)
    describing = (".metadata", "common.pt")
    assert found == Needed((".metadata", "__0_0.distcp", "common.pt"), ("hf/config.json",), True, describing)
