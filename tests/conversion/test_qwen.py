"""Qwen3 as Megatron trains it, and Qwen's MTP in all the configs that it comes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _dist import RELEASE, read
from _families import config_of, random_tensors
from _kit import MEGATRON, Cli, convert, differing, hf_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import diff
from mtp_convert.errors import ConvertError
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip
from mtp_convert.verify.forward import relative_error

GOLDEN = MEGATRON / "qwen2_te"
WEIGHTS = "model.safetensors"


@pytest.fixture(params=["ckpt", "legacy"])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The golden Megatron model as a Hugging Face folder, from either container."""
    convert(GOLDEN / request.param, tmp_path / "hf", "hf", hf_config=GOLDEN / "config.json")
    return tmp_path / "hf"


@torch.no_grad()
def test_transformers_computes_what_megatron_computed(released: Path) -> None:
    outputs = load_file(GOLDEN / "out.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"mtp"}
    assert relative_error(model(outputs["tokens"]).logits, outputs["logits"]) < 1e-5


def test_megatron_comes_back(released: Path, tmp_path: Path) -> None:
    """Every name, also of stacked layers and of objects, and every byte."""
    convert(released, tmp_path / "megatron", "megatron")
    ours, golden = open_checkpoint(tmp_path / "megatron"), open_checkpoint(GOLDEN / "ckpt", hf_config=GOLDEN)
    assert ours.layout.words["decoder"] == "stacked"
    assert ours.stored.tensors.keys() == golden.stored.tensors.keys()
    assert ours.stored.objects == golden.stored.objects
    assert diff(ours, golden).equal


@pytest.mark.parametrize("via", ["megatron", "native"])
def test_roundtrip(released: Path, via: str) -> None:
    found = roundtrip(open_checkpoint(released), Options(via))
    assert found.ok
    assert found.same_files


def test_two_depths_become_one_and_two_again(released: Path, tmp_path: Path, cli: Cli) -> None:
    """One depth has the released names, so folding changes names too."""
    assert "MTP027" in cli("fold", released, tmp_path / "one").err
    convert(released, tmp_path / "first", "hf", depths=1, force_fold="first")
    one = load_file(tmp_path / "first" / WEIGHTS)
    two = load_file(released / WEIGHTS)
    assert torch.equal(one["mtp.fc.weight"], two["mtp.layers.0.eh_proj.weight"])
    assert torch.equal(one["mtp.norm.weight"], two["mtp.layers.0.final_layernorm.weight"])
    assert json.loads((tmp_path / "first" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    convert(tmp_path / "first", tmp_path / "again", "hf", depths=2)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == two.keys()
    assert torch.equal(again["mtp.layers.1.hnorm.weight"], two["mtp.layers.0.hnorm.weight"])


@pytest.mark.parametrize("depths", [0, 1])
def test_a_config_without_a_word_on_mtp(depths: int, tmp_path: Path) -> None:
    """Released Qwen3-Next configs count no depths: what is stored counts, and the config stays as it is."""
    config = {k: v for k, v in config_of("qwen3_next").items() if k != "num_nextn_predict_layers"}
    tensors = {n: t for n, t in random_tensors("qwen3_next").items() if depths or not n.startswith("mtp.")}
    folder = hf_folder(tmp_path / "hf", tensors, config)
    assert open_checkpoint(folder).dims.depths == depths
    convert(folder, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(folder, tmp_path / "back") == []


def test_a_config_that_counts_is_believed(tmp_path: Path) -> None:
    """A field that is there and wrong is an error, under the name that the family has for it."""
    tensors = {n: t for n, t in random_tensors("qwen3_5").items() if not n.startswith("mtp.")}
    with pytest.raises(ConvertError, match="mtp_num_hidden_layers") as caught:
        open_checkpoint(hf_folder(tmp_path / "hf", tensors, config_of("qwen3_5")))
    assert caught.value.code == "MTP025"


WRAPPERS = {"qwen3_5": "qwen3_5_moe", "exaone4_5": "exaone4_5"}


def wrapped(name: str, **more: object) -> dict[str, Any]:
    """The config of a vision-language model around a tiny one."""
    return {"model_type": WRAPPERS[name], "text_config": config_of(name), "vision_config": {"depth": 1}, **more}


@pytest.mark.parametrize("name", WRAPPERS)
def test_below_a_vision_model(name: str, tmp_path: Path) -> None:
    """The language model moves, MTP and the head do not; from Megatron too, which knows nothing of it."""
    tensors = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
        for n, t in random_tensors(name).items()
    }
    folder = hf_folder(tmp_path / "hf", tensors, wrapped(name))
    convert(folder, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(folder, tmp_path / "back") == []
    (tmp_path / "there" / "mtp_convert.json").unlink()
    convert(tmp_path / "there", tmp_path / "forgotten", "hf")
    assert load_file(tmp_path / "forgotten" / WEIGHTS).keys() == tensors.keys()


def test_the_vision_tower_stays_behind_when_asked(tmp_path: Path) -> None:
    tensors = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
        for n, t in random_tensors("qwen3_5").items()
    }
    folder = hf_folder(tmp_path / "hf", {**tensors, "model.visual.norm.weight": torch.ones(4)}, wrapped("qwen3_5"))
    with pytest.raises(ConvertError, match=r"model\.visual\.norm\.weight"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, allow_unmapped=True).unmapped == ("model.visual.norm.weight",)


@pytest.mark.parametrize(("inner", "outer"), [(False, True), (True, False)])
def test_the_outer_config_says_whether_the_head_is_tied(inner: bool, outer: bool, tmp_path: Path) -> None:
    config = wrapped("qwen3_5", tie_word_embeddings=outer)
    config["text_config"]["tie_word_embeddings"] = inner
    tensors = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
        for n, t in random_tensors("qwen3_5").items()
        if not (outer and n.startswith("lm_head"))
    }
    folder = hf_folder(tmp_path / "hf", tensors, config)
    assert open_checkpoint(folder).dims.tied is outer
    convert(folder, tmp_path / "there", "megatron")
    assert ("output_layer.weight" in read(tmp_path / "there" / RELEASE)) is not outer
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(folder, tmp_path / "back") == []


@pytest.mark.parametrize("experts", ["split", "stacked"])
@pytest.mark.parametrize("mtp_experts", ["split", "stacked"])
def test_experts_in_every_form(experts: str, mtp_experts: str, tmp_path: Path) -> None:
    """Qwen3.5 and 3.6 differ in the experts of MTP, and transformers saves them one by one."""
    words = {"experts": experts, "mtp_experts": mtp_experts}
    tensors = random_tensors("qwen3_5")
    hf_folder(tmp_path / "released", tensors, config_of("qwen3_5"))
    convert(tmp_path / "released", tmp_path / "hf", "hf", words=words)
    found = open_checkpoint(tmp_path / "hf")
    assert {word: found.layout.words[word] for word in words} == words
    convert(tmp_path / "hf", tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(tmp_path / "hf", tmp_path / "back") == []
    assert diff(found, open_checkpoint(tmp_path / "released")).equal
