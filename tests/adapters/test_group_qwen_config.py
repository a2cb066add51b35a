"""Families with Qwen's MTP: what a config must be like, and the training arguments that follow from it."""

from __future__ import annotations

import pytest
from _qwen_tiny import NAMES, Config, family, tiny

from mtp_convert.mapping.family import ConfigError

WRONG: list[tuple[str, Config, str]] = [
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ("qwen3", {"intermediate_size": None}, "intermediate_size must be"),
    ("qwen3_next", {"linear_num_value_heads": 3}, "no multiple of linear_num_key_heads 2"),
    ("qwen3_next", {"layer_types": ["linear_attention"]}, "must say 'linear_attention' or 'full_attention'"),
    ("qwen3_next", {"mlp_only_layers": 1}, "mlp_only_layers must be a list"),
    ("qwen3_next", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
    ("qwen3_5", {"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    ("qwen3_5", {"layer_types": ["linear_attention", "other", "full_attention"]}, "'other'"),
    ("qwen3_5", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim"),
    ("mellum", {"mtp_mlp_layer_types": ["sparse", "dense"]}, "mtp_mlp_layer_types must be"),
    ("mellum", {"num_local_experts": 0}, "num_local_experts"),
    ("exaone_moe", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must say"),
    ("exaone_moe", {"num_experts": "4"}, "num_experts must be a positive whole number"),
    ("exaone4_5", {"hidden_size": None}, "hidden_size"),
    ("exaone4_5", {"num_attention_heads": 3}, "no multiple"),
]


@pytest.mark.parametrize(("name", "changed", "message"), WRONG)
def test_a_config_that_cannot_be(name: str, changed: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family(name).dims(tiny(name, **changed), 1)


ARGUMENTS: dict[str, Config] = {
    "qwen3": {"qk_layernorm": True, "mtp_num_layers": 1, "rotary_base": 10000.0, "swiglu": True},
    "qwen3_next": {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0, 1, 0],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 4,
        "attention_output_gate": True,
        "apply_layernorm_1p": True,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_shared_expert_gate": True,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "rotary_percent": 0.5,
    },
    "qwen3_5": {"moe_layer_freq": 1, "linear_attention_freq": [1, 1, 0], "apply_layernorm_1p": True},
    "qwen3_5 dense": {"untie_embeddings_and_output_weights": False, "linear_attention_freq": [1, 1, 0]},
    "mellum": {"window_size": [7, 0], "window_attn_skip_freq": [1, 1, 0], "moe_layer_freq": [0, 1, 1]},
    "exaone_moe": {
        "no_rope_freq": [0, 0, 1],
        "window_attn_skip_freq": [1, 1, 0],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 16,
    },
    "exaone4_5": {"no_rope_freq": [0, 1], "window_size": [7, 0]},
}


@pytest.mark.parametrize("name", NAMES)
def test_megatron_arguments(name: str) -> None:
    found = family(name).megatron_args(tiny(name), 1, False)
    assert {key: found[key] for key in ARGUMENTS[name]} == ARGUMENTS[name]


def test_patterns_without_lists() -> None:
    """The fields that say by number what newer configs list."""
    bare = tiny("exaone_moe", layer_types=None, mlp_layer_types=None, sliding_window_pattern=3)
    assert family("exaone_moe").dims(bare, 1) == family("exaone_moe").dims(tiny("exaone_moe"), 1)
    assert family("exaone_moe").megatron_args(bare, 0, False)["window_attn_skip_freq"] == [1, 1, 0]
    every = tiny("qwen3_5", layer_types=None, num_hidden_layers=8)
    assert family("qwen3_5").dims(every, 1).linear == (True, True, True, False) * 2
    assert "window_size" not in family("exaone4_5").megatron_args(tiny("exaone4_5", sliding_window=None), 0, False)
