"""run_config.yaml: what Megatron-Bridge builds the model from says what the training arguments say, or is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _kit import FIXTURES, MEGATRON, config_of, convert, hf_folder
from safetensors.torch import load_file

from mtp_convert import adapters
from mtp_convert.bridge_config import run_config, unsaid
from mtp_convert.mapping.family import Family

# The fields of Megatron-Bridge 0.6.2's providers with those of Megatron-Core 0.19.2's configs, which they extend.
FIELDS: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "bridge_fields.json").read_text())
FAMILIES = [f for f in adapters.families() if f.bridge_provider]
SYNTAX = {"_target_", "_call_", "_partial_"}


def config(name: str) -> dict[str, Any]:
    found = json.loads((FIXTURES / "configs" / f"{name}.json").read_text())
    assert isinstance(found, dict)
    return found


def model(family: Family, args: dict[str, Any]) -> dict[str, Any]:
    raw = run_config(family.bridge_provider, args, torch_dtype="bfloat16")
    assert raw is not None
    found = json.loads(raw)["model"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_every_field_is_one_of_the_class(family: Family, steps: int) -> None:
    args = family.megatron_args(config(family.name), steps, steps > 1)
    found = model(family, args)
    kind = str(found["_target_"]).rpartition(".")[2]
    assert found.keys() - SYNTAX <= {*FIELDS["core"], *FIELDS[kind]}
    assert found.get("mtp_num_layers") == (steps or None)
    for name in ("hidden_size", "num_attention_heads", "vocab_size", "moe_layer_freq", "kv_lora_rank"):
        assert found.get(name) == args.get(name)


def test_classes() -> None:
    kinds = {f.name: f.bridge_provider.rpartition(".")[2] for f in FAMILIES}
    assert kinds == {
        "nemotron_h": "HybridModelProvider",
        **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "glm_moe_dsa"), "MLAModelProvider"),
        **dict.fromkeys(("qwen3", "glm4_moe", "bailing_moe", "hy_v3"), "GPTModelProvider"),
    }


@pytest.mark.parametrize("name", ["glm4_moe", "glm_moe_dsa"])
def test_layers(name: str) -> None:
    """The class's own default builds layers of one kind; these have dense ones, experts, and an indexer."""
    family = next(f for f in FAMILIES if f.name == name)
    spec = model(family, family.megatron_args(config(name), 1, False))["transformer_layer_spec"]
    assert ("experimental_attention_variant" in spec["_target_"]) is (name == "glm_moe_dsa")
    assert spec.get("_partial_", False) is (name == "glm4_moe")


def test_a_full_query_projection_is_said() -> None:
    """Left out, the class would take a rank of 512."""
    family = next(f for f in FAMILIES if f.name == "deepseek_v3")
    args = family.megatron_args({**config("deepseek_v3"), "q_lora_rank": None}, 1, False)
    assert args["q_lora_rank"] is None
    assert model(family, args)["q_lora_rank"] is None
    assert "q_lora_rank" in model(family, args)


@pytest.mark.parametrize("extra", [{"window_size": [127, 0]}, {"linear_attention_freq": [1, 0]}, {"new_argument": 1}])
def test_no_file_rather_than_half_of_one(extra: dict[str, Any]) -> None:
    family = next(f for f in FAMILIES if f.name == "glm4_moe")
    args = {**family.megatron_args(config("glm4_moe"), 1, False), **extra}
    assert unsaid(family.bridge_provider, args) == list(extra)
    assert run_config(family.bridge_provider, args, torch_dtype="bfloat16") is None


@pytest.mark.parametrize("nested", [False, True])
def test_part_of_a_larger_model_gets_none(nested: bool, tmp_path: Path) -> None:
    golden = MEGATRON / "qwen2_te"
    convert(golden / "ckpt", tmp_path / "hf", "hf", hf_config=golden / "config.json")
    own = config_of(tmp_path / "hf")
    around = {"model_type": "wrapper", "text_config": own} if nested else own
    folder = hf_folder(tmp_path / "src", load_file(tmp_path / "hf" / "model.safetensors"), around)
    convert(folder, tmp_path / "there", "megatron")
    assert (tmp_path / "there" / "release" / "run_config.yaml").is_file() is not nested
