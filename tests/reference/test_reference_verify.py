"""`verify --backend megatron-core`: the real one agrees with transformers and with our tree, place by place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _families import random_folder
from _kit import AUTOMODEL, MEGATRON, convert, hf_folder
from _megatron import HERE, Megatron, install
from safetensors.torch import load_file

pytestmark = pytest.mark.reference
RELEASE = "megatron-core 0.19.2"
AGAINST_TRANSFORMERS = ("deepseek_v3", "qwen3_next", "glm_moe_dsa", "exaone_moe", "glm4_moe", "mimo-one")
AGAINST_OUR_TREE = ("dsv3_te", "qwen2_te", "nemotron_mtpM", "nemotron_d2_rep")
WITHOUT_ENGINE = ("qwen3", "glm4_moe", "glm4_moe-air")
LEGACY = ("glm4_moe", "nemotron_mtpM")  # the others are torch_dist
PADDED = ("exaone_moe", "glm4_moe", "qwen3")  # with rows of the embedding that no token has


@dataclass(frozen=True)
class Judged:
    """Whose code ran both sides, and every place's error and threshold."""

    backends: tuple[str, str]
    places: dict[str, tuple[float, float]]

    @property
    def bad(self) -> list[str]:
        """Places that leave their floor."""
        return [place for place, (error, threshold) in self.places.items() if not error <= threshold]


@pytest.fixture(scope="module")
def megatron() -> Megatron:
    try:
        return install("0.19.2")
    except FileNotFoundError as error:
        if os.environ.get("MTP_CONVERT_REQUIRE_REFERENCE"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def found(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judged]:
    """Every pair of checkpoints by name, the second of each run by the real one with TransformerEngine's layers."""
    scratch = tmp_path_factory.mktemp("engine")
    pairs = {name: written(name, scratch) for name in AGAINST_TRANSFORMERS}
    for name in AGAINST_OUR_TREE:
        golden, there = MEGATRON / name, scratch / name / "there"
        if golden.is_dir():
            convert(golden / "ckpt", scratch / name / "hf", "hf", hf_config=golden / "config.json")
        convert(scratch / name / "hf" if golden.is_dir() else AUTOMODEL / name, there, "megatron", **options(name))
        pairs[name] = there, there
    source, there = pairs["qwen3_next"]
    pairs["damaged"] = damaged(source, scratch / "damaged"), there
    return judged(megatron, scratch, pairs)


@pytest.fixture(scope="module")
def found_without_engine(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judged]:
    """The same with Megatron-Core's own layers."""
    scratch = tmp_path_factory.mktemp("local")
    return judged(megatron, scratch, {name: written(name, scratch) for name in WITHOUT_ENGINE}, "--local")


def options(name: str) -> dict[str, Any]:
    """How to write a checkpoint."""
    return ({"container": "legacy"} if name in LEGACY else {}) | ({"padding": 100} if name in PADDED else {})


def written(name: str, scratch: Path) -> tuple[Path, Path]:
    """A tiny Hugging Face folder of a family, and its Megatron checkpoint."""
    source, there = random_folder(name, scratch / name / "hf"), scratch / name / "there"
    convert(source, there, "megatron", **options(name))
    return source, there


def damaged(source: Path, folder: Path) -> Path:
    """A copy that projects the hidden state where the embedding belongs, and the other way round."""
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.cat(tensors["mtp.fc.weight"].chunk(2, dim=1)[::-1], dim=1)
    return hf_folder(folder, tensors, (source / "config.json").read_text())


def judged(megatron: Megatron, scratch: Path, pairs: dict[str, tuple[Path, Path]], *flags: str) -> dict[str, Judged]:
    out = scratch / "out.json"
    words = [folder for pair in pairs.values() for folder in pair]
    megatron.run("run_verify.py", *flags, out, *words, env={"PYTHONPATH": str(HERE.parents[1])})
    rows = zip(pairs, json.loads(out.read_text()), strict=True)
    return {name: Judged(tuple(row["backends"]), row["places"]) for name, row in rows}


def expect_equal(one: Judged, backend: str) -> None:
    print(one.backends, max(error for error, _ in one.places.values()))
    assert one.backends[1] == backend
    assert one.bad == []
    assert {"embedding", "final_norm", "logits", "mtp.0.fused", "mtp.0.block", "mtp.0.logits"} <= one.places.keys()


@pytest.mark.parametrize("name", AGAINST_TRANSFORMERS)
def test_computes_what_transformers_computes(name: str, found: dict[str, Judged]) -> None:
    expect_equal(found[name], f"{RELEASE}, TransformerEngine specs")
    assert found[name].backends[0].startswith("transformers")


@pytest.mark.parametrize("name", AGAINST_OUR_TREE)
def test_computes_what_our_tree_computes(name: str, found: dict[str, Judged]) -> None:
    expect_equal(found[name], f"{RELEASE}, TransformerEngine specs")
    assert found[name].backends[0] == "mtp-convert's Megatron tree"


@pytest.mark.parametrize("name", WITHOUT_ENGINE)
def test_its_own_layers_read_the_same_checkpoints(name: str, found_without_engine: dict[str, Judged]) -> None:
    expect_equal(found_without_engine[name], f"{RELEASE}, local specs")


def test_a_wrong_weight_is_found_where_it_is(found: dict[str, Judged]) -> None:
    assert found["damaged"].bad == ["mtp.0.fused"]
