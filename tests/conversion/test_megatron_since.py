"""Megatron releases that cannot hold a model, by what its config asks for; and configs that do not say enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import FIXTURES, MEGATRON, Cli, convert, hf_folder

from mtp_convert.adapters import find
from mtp_convert.errors import ConvertError


def folder(path: Path, name: str, **changed: object) -> Path:
    """A family's example model full of zeros, under a config with other fields (None removes one)."""
    config: dict[str, Any] = json.loads((FIXTURES / "configs" / f"{name}.json").read_text())
    family, _ = find(config)
    bindings = family.layout("hf", family.dims(config, 1)).bindings
    config |= changed
    kept = {k: v for k, v in config.items() if v is not None}
    return hf_folder(path, {n: torch.zeros(b.shape) for n, b in bindings.items()}, kept)


def refusal(source: Path, target: Path, version: str, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(ConvertError) as caught:
        convert(source, target, "megatron", megatron_version=version, **options)
    assert caught.value.code == "MTP028"
    assert not target.exists()
    return "\n".join(p.line() for p in caught.value.problems)


def test_sparse_attention_asks_for_a_later_release(tmp_path: Path) -> None:
    """DeepSeek-V3 loads in 0.12, V3.2 with its indexer does not."""
    plain = folder(tmp_path / "plain", "deepseek_v3")
    convert(plain, tmp_path / "old", "megatron", megatron_version="0.12")
    sparse = folder(tmp_path / "sparse", "glm_moe_dsa")
    config = json.loads((sparse / "config.json").read_text())
    indexer = {f: config[f] for f in ("index_n_heads", "index_head_dim", "index_topk")}
    source = folder_with_indexer(tmp_path / "v32", indexer)
    assert "Megatron-Core 0.12 has no experimental_attention_variant" in refusal(source, tmp_path / "out", "0.12")
    convert(source, tmp_path / "new", "megatron", megatron_version="0.16")


def folder_with_indexer(path: Path, indexer: dict[str, Any]) -> Path:
    config = json.loads((FIXTURES / "configs" / "deepseek_v3.json").read_text()) | indexer
    family, _ = find(config)
    bindings = family.layout("hf", family.dims(config, 1)).bindings
    return hf_folder(path, {n: torch.zeros(b.shape) for n, b in bindings.items()}, config)


def test_a_repeated_layer_asks_for_a_later_release(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", "deepseek_v3")
    text = refusal(source, tmp_path / "out", "0.16", steps=3)
    assert "mtp_use_repeated_layer" in text
    assert "0.17 or later" in text
    convert(source, tmp_path / "once", "megatron", megatron_version="0.16")
    convert(source, tmp_path / "often", "megatron", megatron_version="0.17", steps=3)


def test_latent_experts_ask_for_a_later_release(tmp_path: Path) -> None:
    """Without MTP, which this model class has since 0.17."""
    golden = MEGATRON / "hyb_latent"
    convert(golden / "ckpt", tmp_path / "hf", "hf", hf_config=golden / "config.json")
    assert "moe_latent_size" in refusal(tmp_path / "hf", tmp_path / "out", "0.15", depths=0)


def test_what_only_megatron_has_to_be_told(tmp_path: Path, cli: Cli) -> None:
    """A field that no tensor depends on is missed when the arguments are made: an error of the config all the same."""
    source = folder(tmp_path / "src", "glm_moe_dsa", index_topk=None)
    assert cli("inspect", source).code == 0
    done = cli("hf-to-megatron", source, tmp_path / "out")
    assert done.code == 4
    assert "MTP020" in done.err
    assert "index_topk" in done.err
    assert "--hf-config" in done.err
