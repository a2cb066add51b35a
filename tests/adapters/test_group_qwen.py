"""Families with Qwen's MTP: names and shapes against transformers and the releases, and every byte there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import convert, differing, hf_folder
from _qwen_tiny import NAMES, Config, family, tiny
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtp_convert.mapping.layout import Layout

Shapes = dict[str, tuple[int, ...]]


def layout(name: str, layout: str, depths: int, config: Config | None = None, **words: str) -> Layout:
    found, config = family(name), config or tiny(name)
    return found.layout(layout, found.dims(config, depths), words)


def shapes(layout: Layout) -> Shapes:
    return {n: b.shape for n, b in layout.bindings.items()}


def shapes_of(tensors: dict[str, Tensor], tied: bool) -> Shapes:
    return {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == "lm_head.weight")}


def model(name: str) -> PreTrainedModel:
    built: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny(name)))
    return built


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_is_what_transformers_saves_and_holds(name: str, tmp_path: Path) -> None:
    built, tied = model(name), bool(tiny(name)["tie_word_embeddings"])
    built.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert shapes(layout(name, "hf", 0, experts="split")) == shapes_of(saved, tied)
    assert shapes(layout(name, "native", 0)) == shapes_of(dict(built.state_dict()), tied)


FUSION = {
    "mtp.fc.weight": (32, 64),
    "mtp.pre_fc_norm_embedding.weight": (32,),
    "mtp.pre_fc_norm_hidden.weight": (32,),
    "mtp.norm.weight": (32,),
}
ATTENTION = {
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 32),
    "self_attn.q_norm.weight": (8,),
    "self_attn.k_norm.weight": (8,),
}
GATED = {**ATTENTION, "self_attn.q_proj.weight": (64, 32)}
BEFORE = {"input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,)}
BEHIND = {"post_attention_layernorm.weight": (32,), "post_feedforward_layernorm.weight": (32,)}
ROUTED = {
    "mlp.gate.weight": (4, 32),
    **{f"mlp.experts.{e}.{p}_proj.weight": (8, 32) for e in range(4) for p in ("gate", "up")},
    **{f"mlp.experts.{e}.down_proj.weight": (32, 8) for e in range(4)},
}
SHARED = {
    "mlp.shared_expert.gate_proj.weight": (16, 32),
    "mlp.shared_expert.up_proj.weight": (16, 32),
    "mlp.shared_expert.down_proj.weight": (32, 16),
    "mlp.shared_expert_gate.weight": (1, 32),
}


def dense(F: int) -> Shapes:
    return {"mlp.gate_proj.weight": (F, 32), "mlp.up_proj.weight": (F, 32), "mlp.down_proj.weight": (32, F)}


LAYERS: dict[str, Shapes] = {
    "qwen3": {**ATTENTION, **BEFORE, **dense(48)},
    "qwen3_next": {**GATED, **BEFORE, **ROUTED, **SHARED},
    "qwen3_5": {**GATED, **BEFORE, **ROUTED, **SHARED},
    "qwen3_5 dense": {**GATED, **BEFORE, **dense(24)},
    "mellum": {**ATTENTION, **BEFORE, **ROUTED},
    "exaone_moe": {**ATTENTION, **BEFORE, **dense(24)},
    "exaone4_5": {**ATTENTION, **BEHIND, **dense(24)},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trunk", ["model.", "model.language_model."])
def test_one_depth_has_the_released_names(name: str, trunk: str) -> None:
    """MTP stays at the top, wherever the language model is."""
    found = shapes(layout(name, "hf", 1, trunk=trunk))
    wanted = {**FUSION, **{f"mtp.layers.0.{n}": shape for n, shape in LAYERS[name].items()}}
    assert {n: shape for n, shape in found.items() if "mtp" in n} == wanted
    assert all(n.startswith(("mtp.", trunk, "lm_head.")) for n in found)


@pytest.mark.parametrize("name", NAMES)
def test_several_depths_have_names_of_their_own(name: str) -> None:
    found = shapes(layout(name, "hf", 2))
    fusion = {"enorm.weight": (32,), "hnorm.weight": (32,), "eh_proj.weight": (32, 64), "final_layernorm.weight": (32,)}
    wanted = {f"mtp.layers.{k}.{n}": s for k in range(2) for n, s in {**fusion, **LAYERS[name]}.items()}
    assert {n: shape for n, shape in found.items() if "mtp" in n} == wanted


def test_stacked_experts_of_mtp_are_a_spelling_of_their_own() -> None:
    """Qwen3.5 stacks all experts but those of MTP; Qwen3.6 stacks these too."""
    released = layout("qwen3_5", "hf", 1).bindings
    assert "model.layers.0.mlp.experts.gate_up_proj" in released
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in released
    stacked = shapes(layout("qwen3_5", "hf", 1, mtp_experts="stacked"))
    assert stacked["mtp.layers.0.mlp.experts.gate_up_proj"] == (4, 16, 32)
    assert stacked["mtp.layers.0.mlp.experts.down_proj"] == (4, 32, 8)
    assert not any("mtp.layers.0.mlp.experts.0" in n for n in stacked)


DELTA_NET = {
    "self_attention.in_proj.layer_norm_weight": (32,),
    "self_attention.in_proj.weight.query": (16, 32),
    "self_attention.in_proj.weight.key": (16, 32),
    "self_attention.in_proj.weight.value": (16, 32),
    "self_attention.in_proj.weight.z": (16, 32),
    "self_attention.in_proj.weight.beta": (4, 32),
    "self_attention.in_proj.weight.alpha": (4, 32),
    "self_attention.conv1d.weight.query": (16, 1, 4),
    "self_attention.conv1d.weight.key": (16, 1, 4),
    "self_attention.conv1d.weight.value": (16, 1, 4),
    "self_attention.A_log": (4,),
    "self_attention.dt_bias": (4,),
    "self_attention.out_norm.weight": (4,),
    "self_attention.out_proj.weight": (32, 16),
}
FUSED = {"self_attention.in_proj.weight": (72, 32), "self_attention.conv1d.weight": (48, 1, 4)}


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5 dense"])
def test_a_delta_net_is_named_as_in_megatron_core(name: str) -> None:
    """The names that megatron-core 0.19.2 gave a model of this config, in torch_dist and in its state_dict."""
    head = "decoder.layers.0."
    for keys, other in (("dist", {}), ("state_dict", FUSED)):
        found = shapes(layout(name, "megatron", 1, keys=keys))
        wanted = {n: s for n, s in DELTA_NET.items() if not any(n.startswith(f"{f}.") for f in other)} | other
        assert {n.removeprefix(head): s for n, s in found.items() if n.startswith(f"{head}self_")} == wanted
    states = {"in_proj", "out_norm", "out_proj"}
    objects = {o.removeprefix(head) for o in layout(name, "megatron", 1).objects if o.startswith(f"{head}self_")}
    assert objects == {f"self_attention.{m}._extra_state/shard_0_1" for m in states}


def test_norms_behind_a_block_are_named_as_in_megatron_bridge() -> None:
    for head in ("decoder.layers.1.", "mtp.layers.0.transformer_layer."):
        found = layout("exaone4_5", "megatron", 1)
        norms = {n.removeprefix(head) for n in found.bindings if n.startswith(head) and "norm" in n}
        linears = {"self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"}
        assert norms == linears | {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}


def weights(name: str, config: Config, **words: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = layout(name, "hf", family(name).depths.declared(config), config, **words).bindings
    return {n: torch.randn(b.shape, generator=generator) for n, b in found.items()}


SIZES: dict[str, dict[str, Any]] = {
    "torch_dist": {"to": "megatron"},
    "legacy": {"to": "megatron", "container": "legacy"},
    "tp2 pp2": {"to": "megatron", "container": "legacy", "parallel": {"tensor": 2, "pipeline": 2}},
    "native": {"to": "native"},
}


@pytest.mark.parametrize("via", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_comes_back(name: str, via: str, tmp_path: Path) -> None:
    """Numbers of any size, in which a shift by 1 loses bits."""
    config = tiny(name, num_hidden_layers=4, **LONGER[name])
    hf_folder(tmp_path / "hf", weights(name, config), config)
    convert(tmp_path / "hf", tmp_path / "there", **SIZES[via])
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(tmp_path / "hf", tmp_path / "back") == []


SLIDING, LINEAR = ["sliding_attention"] * 3, ["linear_attention"] * 3
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
LONGER: dict[str, dict[str, Any]] = {  # four layers, for two stages
    "qwen3": {},
    "qwen3_next": {},
    "qwen3_5": {"layer_types": [*LINEAR, "full_attention"]},
    "qwen3_5 dense": {"layer_types": [*LINEAR, "full_attention"]},
    "mellum": {"layer_types": [*SLIDING, "full_attention"], **SPARSE},
    "exaone_moe": {"layer_types": [*SLIDING, "full_attention"], **SPARSE},
    "exaone4_5": {"layer_types": [*SLIDING, "full_attention"]},
}


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "mellum", "exaone_moe"])
def test_every_byte_comes_back_from_expert_ranks(name: str, tmp_path: Path) -> None:
    config = tiny(name)
    hf_folder(tmp_path / "hf", weights(name, config, experts="split"), config)
    convert(tmp_path / "hf", tmp_path / "there", "megatron", container="legacy", parallel={"expert": 2})
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(tmp_path / "hf", tmp_path / "back") == []


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_holds_in_some_spelling(name: str) -> None:
    found = family(name)
    for place in found.places(found.dims(tiny(name), 1)):
        for lay, rows in place.block.rows.items():
            wanted = {pair for row in rows for pair in row.when.items()}
            assert wanted <= {(word, s) for word, spellings in found.choices[lay].items() for s in spellings}


def test_sizes_of_the_released_qwen3_next() -> None:
    """80B-A3B: 512 experts, 16 key heads and 32 value heads of 128; four of its 48 layers, which repeat."""
    sizes: Config = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 4, "full_attention_interval": 4}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "mlp_only_layers": []}
    sizes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    sizes |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    sizes |= {"num_experts": 512, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
    found = shapes(layout("qwen3_next", "hf", 1, tiny("qwen3_next", **sizes)))
    common = 2 + 1 + 3 * 512 + 3 + 1  # norms, router, experts, shared expert and its gate
    assert len(found) == 3 + 4 * common + 3 * 7 + 6 + (4 + common + 6)
    assert found["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (12288, 2048)
    assert found["model.layers.0.linear_attn.in_proj_ba.weight"] == (64, 2048)
    assert found["model.layers.0.linear_attn.conv1d.weight"] == (8192, 1, 4)
    assert found["model.layers.3.self_attn.q_proj.weight"] == (8192, 2048)
    assert found["mtp.fc.weight"] == (2048, 4096)
