"""Settings from Megatron's arguments and from Hugging Face configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _golden import GOLDEN, GPT, HYBRID, TINY, arguments, build, golden_config, read_json, tiny

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout

ARGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "ffn_hidden_size": 24,
    "padded_vocab_size": 32,
    "vocab_size": 30,
    "swiglu": True,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "vocab_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
SPARSE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def from_hf(**changes: Any) -> TransformerConfig:  # noqa: ANN401
    return TransformerConfig.from_hf_config({**QWEN3, **changes})


def fields(config: TransformerConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("name", [*GPT, *HYBRID])
def test_both_sources_describe_one_model(name: str) -> None:
    """A Hugging Face config counts stored MTP layers, and has another length limit and sizes that are not used."""
    ours = golden_config(name)
    run = {n: getattr(ours, n) for n in ("mtp_num_layers", "mtp_use_repeated_layer", "hybrid_layer_pattern")}
    theirs = TransformerConfig.from_hf_config(read_json(GOLDEN / name / "config.json"), **run)
    other = {"max_position_embeddings": 1} | ({"kv_channels": 0} if ours.multi_latent_attention else {})
    assert replace(theirs, **other) == replace(ours, **other)


def test_arguments_of_megatron_lm() -> None:
    config = TransformerConfig.from_megatron_args(ARGS | {"norm_epsilon": 1e-6, "apply_layernorm_1p": True})
    assert fields(config, "vocab_size", "num_query_groups", "kv_channels", "activation", "gated_linear_unit") == {
        "vocab_size": 32,
        "num_query_groups": 4,
        "kv_channels": 4,
        "activation": "silu",
        "gated_linear_unit": True,
    }
    assert config.layernorm_epsilon == 1e-6
    assert config.layernorm_zero_centered_gamma
    assert not config.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"group_query_attention": False, "num_query_groups": 1}, {"num_query_groups": 4}),
        ({"group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 2}),
        ({"swiglu": False}, {"activation": "gelu", "gated_linear_unit": False}),
        ({"swiglu": False, "squared_relu": True}, {"activation": "squared_relu"}),
        ({"untie_embeddings_and_output_weights": False}, {"share_embeddings_and_output_weights": True}),
        ({"mtp_num_layers": 0}, {"mtp_num_layers": None}),
        ({"params_dtype": "torch.bfloat16"}, {"params_dtype": torch.bfloat16}),
        ({"moe_layer_freq": [0, 1]}, {"moe_layer_freq": (0, 1)}),
        (
            {"num_layers": None, "hybrid_layer_pattern": "*-/*/*"},
            {"num_layers": 2, "hybrid_layer_pattern": "*-/*/*", "mtp_num_layers": 2},
        ),
        (
            {"hybrid_override_pattern": "*-", "mtp_hybrid_override_pattern": "*", "mtp_num_layers": 2},
            {"hybrid_layer_pattern": "*-/*/*"},
        ),
    ],
    ids=str,
)
def test_arguments_decide(args: dict[str, Any], expected: dict[str, Any]) -> None:
    assert fields(TransformerConfig.from_megatron_args(ARGS | args), *expected) == expected


def test_a_layout_in_words_becomes_stages() -> None:
    args = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}
    config = TransformerConfig.from_megatron_args(ARGS | args)
    assert config.pipeline_model_parallel_layout == PipelineParallelLayerLayout.from_str("Et|tL", 2)


@pytest.mark.parametrize(
    "args",
    [
        {"use_rope_scaling": True},
        {"softmax_type": "learnable"},
        {"experimental_attention_variant": "dsv5"},
        {"enable_mhc_connections": True},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"qk_l2_norm": True},
    ],
    ids=str,
)
def test_numbers_that_would_be_wrong_are_refused(args: dict[str, Any]) -> None:
    (name,) = args
    with pytest.raises(ValueError, match=f"not supported here: {name}="):
        TransformerConfig.from_megatron_args(ARGS | args)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="settings missing: hidden_size, num_layers; not supported here: qk_l2_norm"):
        TransformerConfig.from_megatron_args({"num_attention_heads": 4, "qk_l2_norm": True})


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"qk_layernorm": True, "rotary_base": 1e6, "kv_channels": 8, "mtp_num_layers": None}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rotary_base": 5e5}),
        ({"tie_word_embeddings": True}, {"share_embeddings_and_output_weights": True}),
        ({"model_type": "llama"}, {"qk_layernorm": False, "add_qkv_bias": False}),
        ({"model_type": "llama", "head_dim": None}, {"kv_channels": 4}),
        ({"model_type": "qwen2"}, {"add_qkv_bias": True, "qk_layernorm": False}),
        (
            {"model_type": "qwen3_moe", **SPARSE, "norm_topk_prob": True},
            {"moe_router_pre_softmax": False, "moe_layer_freq": 1, "moe_ffn_hidden_size": 12},
        ),
        (
            {"model_type": "qwen3_moe", **SPARSE, "mlp_only_layers": [1], "decoder_sparse_step": 2},
            {"moe_router_pre_softmax": True, "moe_layer_freq": (0, 0, 0, 1)},
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
            {"num_moe_experts": 4, "moe_router_pre_softmax": False, "moe_ffn_hidden_size": 24},
        ),
        (
            {"model_type": "qwen2_moe", **SPARSE, "shared_expert_intermediate_size": 20},
            {"moe_shared_expert_gate": True, "moe_shared_expert_intermediate_size": 20, "add_qkv_bias": True},
        ),
        (
            {
                "model_type": "glm4_moe",
                **ROUTED,
                "first_k_dense_replace": 1,
                "partial_rotary_factor": 0.5,
                "use_qk_norm": True,
                "attention_bias": True,
                "num_nextn_predict_layers": 1,
            },
            {
                "moe_layer_freq": (0, 1, 1, 1),
                "rotary_percent": 0.5,
                "qk_layernorm": True,
                "add_qkv_bias": True,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_topk_scaling_factor": 2.5,
                "moe_shared_expert_intermediate_size": 24,
                "mtp_num_layers": 1,
            },
        ),
        (
            {
                "model_type": "deepseek_v3",
                **ROUTED,
                **LATENT,
                "v_head_dim": 8,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "original_max_position_embeddings": 4096,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
            },
            {
                "rope_type": "yarn",
                "rotary_scaling_factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale_all_dim": 1.0,
                "multi_latent_attention": True,
                "q_lora_rank": 8,
            },
        ),
        (
            {
                "model_type": "qwen3_next",
                **SPARSE,
                **LINEAR,
                "shared_expert_intermediate_size": 20,
                "partial_rotary_factor": 0.25,
                "norm_topk_prob": True,
            },
            {
                "linear_attention_freq": (1, 1, 1, 0),
                "attention_output_gate": True,
                "layernorm_zero_centered_gamma": True,
                "rotary_percent": 0.25,
                "moe_shared_expert_gate": True,
            },
        ),
    ],
    ids=lambda c: c.get("model_type", "qwen3") if "hidden_act" not in c else "",
)
def test_hugging_face_configs(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = from_hf(**config)
    assert fields(found, *expected) == expected
    with torch.device("meta"):
        build(found)


def test_fields_can_be_changed() -> None:
    config = TransformerConfig.from_hf_config(QWEN3, mtp_num_layers=3, params_dtype=torch.bfloat16)
    assert (config.mtp_num_layers, config.params_dtype) == (3, torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not among deepseek_v3, glm4_moe"),
        ({"hidden_size": None, "vocab_size": None}, "settings missing in config.json: hidden_size, vocab_size"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_attention_heads": None},
            "settings missing in config.json: num_attention_heads, num_experts_per_tok",
        ),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"attention_bias": True, "mlp_bias": True}, r"attention_bias=True \(only False\), mlp_bias=True"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding_window=4096 \(only None\)"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope type 'llama3'"),
    ],
    ids=str,
)
def test_configs_that_are_not_understood_are_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        from_hf(**config)


def test_pattern_spellings_must_agree() -> None:
    config = read_json(GOLDEN / "hyb_m" / "config.json")
    assert TransformerConfig.from_hf_config(config).hybrid_layer_pattern == arguments("hyb_m")["hybrid_layer_pattern"]
    both = {"hybrid_override_pattern": "M*ME-", "layers_block_type": ["mamba", "moe"]}
    with pytest.raises(ValueError, match="disagree"):
        TransformerConfig.from_hf_config(config | both)


# --- the config itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"activation": "relu"}, "activation is 'relu', expected one of 'silu', 'gelu', 'squared_relu'"),
        ({"moe_layer_freq": (1,)}, "moe_layer_freq has 1 entries for 2 layers"),
        ({"linear_attention_freq": 0}, "linear_attention_freq is 0"),
        ({"num_moe_experts": 4}, "sizes missing: moe_ffn_hidden_size, moe_router_topk"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is no multiple of num_query_groups 3"),
        ({"moe_router_num_groups": 2, "num_moe_experts": 4}, "moe_router_num_groups needs moe_router_group_topk"),
        ({"hybrid_layer_pattern": "*-*/*/*"}, "3 layers in the pattern, num_layers is 2"),
        ({"hybrid_layer_pattern": "*-/*"}, "1 MTP depths in the pattern, mtp_num_layers is 2"),
        ({"hybrid_layer_pattern": "G-/-/-", "activation": "gelu"}, "linear attention needs activation 'silu'"),
        (
            {"hybrid_layer_pattern": "M-/-/-", "megatron_version": (0, 18)},
            "Mamba mixers have other names before 0.19",
        ),
        ({"hybrid_layer_pattern": "M-/-/-"}, "sizes missing: mamba_head_dim"),
    ],
    ids=str,
)
def test_settings_at_odds_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        tiny(**changes)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        TransformerConfig(**{**TINY, "num_layers": 1, "activation": "relu", "rope_type": "x", "ffn_hidden_size": 0})
    assert len(str(caught.value).split("; ")) == 3


@pytest.mark.parametrize(
    ("freq", "expected"),
    [(1, (True,) * 4), (2, (True, False, True, False)), ((0, 1, 1, 0), (False, True, True, False))],
)
def test_layers_with_experts(freq: int | tuple[int, ...], expected: tuple[bool, ...]) -> None:
    sizes = {"num_moe_experts": 4, "moe_router_topk": 1, "moe_ffn_hidden_size": 8}
    config = tiny(num_layers=4, moe_layer_freq=freq, **sizes)
    assert config.moe_layers == expected
    assert config.homogeneous is (freq == 1)


@pytest.mark.parametrize(("depths", "repeated", "stored"), [(None, False, 0), (3, False, 3), (3, True, 1)])
def test_stored_mtp_layers(depths: int | None, repeated: bool, stored: int) -> None:
    assert tiny(mtp_num_layers=depths, mtp_use_repeated_layer=repeated).mtp_stored_layers == stored
