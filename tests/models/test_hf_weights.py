"""transformers' own rules, tensor by tensor: what they make is what its `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _families import random_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtp_convert.models.hf_mtp import HfWithMtp, load_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "hy_v3", "mimo", "qwen3_5", "qwen3_next"])
def test_what_is_made_is_what_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = random_folder(name, tmp_path / "hf")
    config, stored = load_config(folder / "config.json"), load_file(folder / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    model, made = HfWithMtp.empty(config, stored.keys(), dtype)
    state = model.model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for tensor, value in expected.state_dict().items():
        how = made[f"model.{tensor}"]
        found = how.recipe.make(lambda stored_name: stored[stored_name])[how.name].to(state[tensor].dtype)
        assert found.dtype == value.dtype, tensor
        assert torch.equal(found, value), tensor
    computed = {n: b for n, b in model.model.named_buffers() if n not in state}
    assert computed
    assert all(torch.equal(b, expected.get_buffer(n)) for n, b in computed.items())
    depths = {n: how for n, how in made.items() if n.startswith("depths.")}
    assert {n for how in depths.values() for n in how.sources} <= stored.keys()
    assert depths.keys() == {n for n in model.state_dict() if n.startswith("depths.")}


def test_everything_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = random_folder("deepseek_v3", tmp_path / "hf")
    config, stored = load_config(folder / "config.json"), load_file(folder / "model.safetensors")
    lacking = {"model.norm.weight", "model.layers.1.input_layernorm.weight"}
    with pytest.raises(ValueError, match=r"2 tensors of the model: model\.model\.layers\.1\..*model\.model\.norm"):
        HfWithMtp.empty(config, stored.keys() - lacking, torch.float32)


def test_a_depth_with_tensors_too_many_is_refused(tmp_path: Path) -> None:
    folder = random_folder("deepseek_v3", tmp_path / "hf")
    config, stored = load_config(folder / "config.json"), load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no decoder layer has: model\.layers\.4\.self_attn\.extra\.weight"):
        HfWithMtp.empty(config, {*stored, "model.layers.4.self_attn.extra.weight"}, torch.float32)
