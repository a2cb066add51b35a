"""Copies that are none: what is stored twice with different numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, MEGATRON, Cli, Tensors, config_of, convert, hf_folder
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import diff

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
STREAMS = AUTOMODEL / "dsv4_d1"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A Qwen3 whose config ties the head to the embedding, and that stores another head."""
    golden = MEGATRON / "qwen2_te"
    convert(golden / "ckpt", tmp_path / "qwen", "hf", hf_config=golden / "config.json")
    config = {**config_of(tmp_path / "qwen"), "tie_word_embeddings": True}
    return hf_folder(tmp_path / "tied", tensors(tmp_path / "qwen"), config)


def tensors(folder: Path) -> Tensors:
    return Tensors(load_file(folder / WEIGHTS))


def test_a_head_of_its_own_is_refused(tied: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("hf-to-megatron", tied, tmp_path / "out")
    assert done.code == 4
    assert HEAD in done.err
    assert "--copies keep" in done.err


def test_a_head_of_its_own_is_kept(tied: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("hf-to-megatron", tied, tmp_path / "out", "--copies", "keep")
    assert done.code == 0, done.err
    assert "tie_word_embeddings is false" in done.out
    there = open_checkpoint(tmp_path / "out")
    assert not there.dims.tied
    arguments = there.stored.arguments["args"]
    assert isinstance(arguments, dict)
    assert arguments["untie_embeddings_and_output_weights"] is True
    convert(tmp_path / "out", tmp_path / "back", "hf")
    found, wanted = tensors(tmp_path / "back"), tensors(tied)
    assert found.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []
    assert config_of(tmp_path / "back") == {**config_of(tied), "tie_word_embeddings": False}
    assert config_of(tied)["tie_word_embeddings"] is True


def test_the_kept_head_is_the_same_as_without_the_tie(tied: Path, tmp_path: Path) -> None:
    convert(tied, tmp_path / "out", "megatron", copies="keep")
    plain = open_checkpoint(tmp_path / "qwen")
    assert diff(plain, open_checkpoint(tmp_path / "out")).equal


class TestCopiesOfDepths:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        found = tensors(STREAMS)
        found["mtp.0.head.weight"] = found["head.weight"] + 1
        found["mtp.0.emb.tok_emb.weight"] = found["embed.weight"].clone()
        return hf_folder(tmp_path / "src", found, config_of(STREAMS))

    def test_they_stay_in_their_own_layout(self, source: Path, tmp_path: Path, cli: Cli) -> None:
        done = cli("convert", source, tmp_path / "out", "--to", "hf", "--copies", "keep", "--dtype", "fp32")
        assert done.code == 0, done.err
        assert "mtp.0.head.weight" in done.out
        found, wanted = tensors(tmp_path / "out"), tensors(source)
        assert found.keys() == wanted.keys()
        assert [n for n, t in wanted.items() if not torch.equal(found[n], t.to(found[n].dtype))] == []

    def test_no_other_layout_has_a_place_for_them(self, source: Path, tmp_path: Path, cli: Cli) -> None:
        done = cli("hf-to-megatron", source, tmp_path / "out", "--copies", "keep")
        assert done.code == 4
        assert "mtp.0.head.weight" in done.err
        assert "use-main" in done.err
        assert "emb.tok_emb" not in done.err
        assert not (tmp_path / "out").exists()


def test_equal_copies_need_no_policy(tmp_path: Path) -> None:
    """Nothing is untied unless numbers differ."""
    golden = MEGATRON / "qwen2_te"
    convert(golden / "ckpt", tmp_path / "qwen", "hf", hf_config=golden / "config.json")
    found = tensors(tmp_path / "qwen")
    found[HEAD] = found["model.embed_tokens.weight"].clone()
    config = {**config_of(tmp_path / "qwen"), "tie_word_embeddings": True}
    source = hf_folder(tmp_path / "tied", found, config)
    convert(source, tmp_path / "out", "megatron", copies="keep")
    assert open_checkpoint(tmp_path / "out").dims.tied
