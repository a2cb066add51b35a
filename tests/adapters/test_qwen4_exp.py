"""Qwen4-Exp: names and shapes against transformers, MTP as loaders read it, and every byte there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import FIXTURES, convert, differing, hf_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_convert.adapters.qwen4_exp import FAMILY, primes
from mtp_convert.mapping.family import ConfigError
from mtp_convert.mapping.layout import Layout

Config = dict[str, Any]


def tiny(**changed: object) -> Config:
    config: Config = json.loads((FIXTURES / "configs" / "qwen4_exp.json").read_text())
    return {k: v for k, v in {**config, **changed}.items() if v is not None}


def layout(name: str, depths: int, config: Config | None = None, **words: str) -> Layout:
    return FAMILY.layout(name, FAMILY.dims(config or tiny(), depths), words)


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {n: b.shape for n, b in layout.bindings.items()}


@pytest.mark.parametrize("changed", [{}, {"ple_layer_ids": [2]}, {"ple_layer_ids": []}])
def test_the_backbone_is_what_transformers_saves_and_holds(changed: Config, tmp_path: Path) -> None:
    config = tiny(**changed)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    built.save_pretrained(tmp_path)
    saved = {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()}
    assert shapes(layout("hf", 0, config, experts="split")) == saved
    held = {n: tuple(t.shape) for n, t in built.state_dict().items()}
    assert shapes(layout("native", 0, config)) == held


MIXER = {
    "hc_norm.weight": (64,),
    "input_mix_weight_down.weight": (6, 64),
    "input_mix_weight_up.weight": (64, 6),
}
MTP = {
    "pre_fc_norm_embedding.weight": (32,),
    "pre_fc_norm_hidden.weight": (64,),
    "fc_embedding.weight": (32, 32),
    "fc_hidden.weight": (32, 32),
    **{f"hyper_connection_mixer.{n}": s for n, s in MIXER.items()},
    **{f"layers.0.{p}_hyper_connection.{n}": s for p in ("attn", "mlp") for n, s in MIXER.items()},
    **{f"layers.0.{p}_hyper_connection.block_inject_weight.weight": (2, 64) for p in ("attn", "mlp")},
    "layers.0.self_attn.q_proj.weight": (64, 32),
    "layers.0.self_attn.k_proj.weight": (16, 32),
    "layers.0.self_attn.v_proj.weight": (16, 32),
    "layers.0.self_attn.o_proj.weight": (32, 32),
    "layers.0.self_attn.q_norm.weight": (8,),
    "layers.0.self_attn.k_norm.weight": (8,),
    "layers.0.self_attn.indexer.index_qk_proj.weight": (24, 32),
    "layers.0.self_attn.indexer.q_layernorm.weight": (8,),
    "layers.0.self_attn.indexer.k_layernorm.weight": (8,),
    "layers.0.mlp.gate.weight": (4, 32),
    "layers.0.mlp.experts.gate_up_proj": (4, 16, 32),
    "layers.0.mlp.experts.down_proj": (4, 32, 8),
    "layers.0.mlp.shared_expert.gate_proj.weight": (16, 32),
    "layers.0.mlp.shared_expert.up_proj.weight": (16, 32),
    "layers.0.mlp.shared_expert.down_proj.weight": (32, 16),
    "layers.0.mlp.shared_expert_gate.weight": (1, 32),
}


def test_mtp_has_the_released_names() -> None:
    found = shapes(layout("hf", 1, trunk="model.language_model."))
    assert {n.removeprefix("mtp."): s for n, s in found.items() if n.startswith("mtp.")} == MTP
    two = {n for n in shapes(layout("hf", 2)) if n.startswith("mtp.")}
    assert len(two) == 2 * len(MTP)
    assert all(n.startswith(("mtp.layers.0.", "mtp.layers.1.")) for n in two)


def test_the_output_norm_of_a_delta_net_is_not_shifted() -> None:
    assert {b.plus for b in layout("megatron", 1).bindings.values()} == {0.0}


def weights(config: Config, **words: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {n: torch.randn(b.shape, generator=generator) for n, b in layout("hf", 1, config, **words).bindings.items()}
    whole = ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
    return {n: (t * 2**40).long() if n.endswith(whole) else t for n, t in found.items()}


SIZES: dict[str, dict[str, Any]] = {
    "torch_dist": {"to": "megatron"},
    "bfloat16": {"to": "megatron"},
    "tp2 ep2": {"to": "megatron", "container": "legacy", "parallel": {"tensor": 2, "expert": 2, "expert_tensor": 1}},
    "pp3": {"to": "megatron", "container": "legacy", "parallel": {"pipeline": 3}},
    "native": {"to": "native"},
}


@pytest.mark.parametrize("via", SIZES)
def test_every_byte_comes_back(via: str, tmp_path: Path) -> None:
    config = tiny()
    tensors = weights(config)
    if via == "bfloat16":
        tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    hf_folder(tmp_path / "hf", tensors, config)
    convert(tmp_path / "hf", tmp_path / "there", **SIZES[via])
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(tmp_path / "hf", tmp_path / "back") == []


def test_ranks_cut_an_ngram_table_and_not_its_shards(tmp_path: Path) -> None:
    config = tiny()
    tensors = weights(config)
    name = "model.layers.0.ple.ple_embedding.ngram_embedding"
    whole = torch.cat([tensors[f"{name}.shard_{part}.weight"] for part in range(3)])
    hf_folder(tmp_path / "hf", tensors, config)
    convert(tmp_path / "hf", tmp_path / "there", "megatron", container="legacy", parallel={"tensor": 2})
    for rank in range(2):
        path = tmp_path / "there" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)["model"]
        share = state["decoder.layers.0.ple.ple_embedding.ngram_embedding.weight"]
        assert torch.equal(share, whole.chunk(2)[rank])


def test_primes() -> None:
    assert primes(50, 6) == (53, 59, 61, 67, 71, 73)
    assert primes(53, 2) == (53, 59)
    assert primes(20_000_000, 2) == (20_000_003, 20_000_023)


WRONG: list[tuple[Config, str]] = [
    ({"ple_layer_ids": [4]}, "ple_layer_ids must be layers from 1 to 3"),
    ({"ple_embed_dim": 6}, "no multiple of the 4 n-gram heads"),
    ({"ngram_size": 1}, "no multiple of the 0 n-gram heads"),
    ({"split_ngram_parts": 300}, "empty"),
    ({"hc_count": None}, "hc_count"),
    ({"indexer_n_heads": None}, "indexer_n_heads"),
    ({"layer_types": ["linear_attention", "sliding_attention", "indexed_attention"]}, "layer_types must say"),
    ({"attention_bias": True}, "attention_bias"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_config_that_cannot_be(changed: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.dims(tiny(**changed), 1)


def test_megatron_arguments() -> None:
    found = FAMILY.megatron_args(tiny(), 1, False)
    wanted = {"linear_attention_freq": [1, 1, 0], "mtp_num_layers": 1, "num_experts": 4, "rotary_percent": 0.5}
    assert {key: found[key] for key in wanted} == wanted
