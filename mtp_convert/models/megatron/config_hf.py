"""Model settings from a Hugging Face `config.json`: how Megatron would train the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtp_convert.models.megatron.hybrid_pattern import HybridPattern

Config = Mapping[str, Any]
Settings = dict[str, Any]

# config.json spells blocks in words; the last two are those of transformers 5.
_SYMBOL_OF = {
    "mamba": "M",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
    "linear_attention": "M",
    "full_attention": "*",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "squared_relu"}


_PLAIN: Settings = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
_BIASED_ROUTER: Settings = {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
# What a family's other settings take for granted; one that is not mentioned is believed to be so.
_FIXED: dict[str, Settings] = {
    "llama": _PLAIN,
    "mistral": _PLAIN | {"sliding_window": None},
    "mixtral": _PLAIN | {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN,
    "qwen3_next": _PLAIN,
    "glm4_moe": _BIASED_ROUTER,
    "deepseek_v3": _BIASED_ROUTER | {"attention_bias": False},
    "nemotron_h": _PLAIN
    | {
        "norm_topk_prob": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "conv_kernel": 4,
        "mamba_hidden_act": "silu",
    },
}


def settings(config: Config) -> Settings:
    """Fields of TransformerConfig; ValueError names what is missing or not supported.

    MTP depths are the stored ones; a layer that is stored once and run more often cannot be seen from a config.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"model_type {kind!r} is not among {', '.join(sorted(_FAMILIES))}")
    fixed = _FIXED[kind].items()
    if wrong := [f"{n}={config[n]!r} (only {value!r})" for n, value in fixed if config.get(n) not in (None, value)]:
        raise ValueError(f"not supported here: {', '.join(wrong)}")
    reader = _Reader(config)
    found = _FAMILIES[kind](reader)
    if reader.missing:
        raise ValueError(f"settings missing in config.json: {', '.join(dict.fromkeys(reader.missing))}")
    return found


class _Reader(dict[str, Any]):
    """A config that notes which settings it was asked for in vain; it gives 0 for them. None counts as not there."""

    def __init__(self, config: Config) -> None:
        super().__init__({name: value for name, value in config.items() if value is not None})
        self.missing: list[str] = []

    def __missing__(self, name: str) -> int:
        self.missing.append(name)
        return 0


def _gpt(config: Config) -> Settings:
    """What all GPT models have in common."""
    heads, rope = int(config["num_attention_heads"]), _rope(config)
    return {
        **_shared(config),
        "num_layers": config["num_hidden_layers"],
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // max(heads, 1),
        "ffn_hidden_size": config.get("intermediate_size") or 0,
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "position_embedding_type": "rope",
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "rotary_percent": float(rope.get("partial_rotary_factor") or 1.0),
        "gated_linear_unit": True,
        "activation": _activation(config, "hidden_act", "silu"),
        "add_qkv_bias": bool(config.get("attention_bias")),
        "mtp_num_layers": config.get("num_nextn_predict_layers") or config.get("mtp_num_hidden_layers") or None,
    }


def _shared(config: Config) -> Settings:
    return {
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config.get("max_position_embeddings", 4096),
        "num_attention_heads": config.get("num_attention_heads") or 0,
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings")),
    }


def _rope(config: Config) -> dict[str, Any]:
    """Rotary settings, which stand together since transformers 5, and apart before."""
    apart = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    rope = {**apart, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not (kind == "yarn" and config.get("kv_lora_rank")):
        raise ValueError(f"rope type {kind!r} is not supported here")
    return rope


def _activation(config: Config, name: str, usual: str) -> str:
    written = config.get(name) or usual
    if written not in _ACTIVATIONS:
        raise ValueError(f"{name} is {written!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[written]


def _softmax_experts(config: Config, experts: str = "num_experts") -> Settings:
    """A softmax router; renormalising the chosen scores is the same as a softmax over the chosen experts."""
    return {
        "num_moe_experts": config[experts],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config["intermediate_size"],
        "moe_router_pre_softmax": not config.get("norm_topk_prob", experts == "num_local_experts"),
        "moe_layer_freq": _sparse_layers(config),
    }


def _sparse_layers(config: Config) -> int | tuple[int, ...]:
    """Which layers have experts; 1 if all."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return _frequency([int((layer + 1) % step == 0 and layer not in dense) for layer in layers])


def _frequency(layers: list[int]) -> int | tuple[int, ...]:
    return 1 if all(layers) else tuple(layers)


def _sigmoid_experts(config: Config) -> Settings:
    """A sigmoid router with a bias for the choice, dense layers first, shared experts as one."""
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace") or 0
    return {
        "num_moe_experts": config["n_routed_experts"],
        "moe_layer_freq": _frequency([0] * dense + [1] * (layers - dense)),
        **_sigmoid_router(config),
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0)
        or None,
    }


def _sigmoid_router(config: Config) -> Settings:
    groups = config.get("n_group") or 1
    return {
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": float(config.get("routed_scaling_factor") or 1.0),
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": config.get("topk_group") if groups > 1 else None,
    }


def _latent_attention(config: Config) -> Settings:
    rope = _rope(config)
    latent = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rotary_percent": 1.0,
    }
    if "factor" not in rope:
        return latent
    return latent | {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": float(rope.get("beta_fast", 32)),
        "beta_slow": float(rope.get("beta_slow", 1)),
        "mscale": float(rope.get("mscale") or 1.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }


def _qwen2_moe(config: Config) -> Settings:
    return {
        **_gpt(config),
        **_softmax_experts(config),
        **_gated_shared_expert(config),
        "add_qkv_bias": bool(config.get("qkv_bias", True)),
    }


def _gated_shared_expert(config: Config) -> Settings:
    return {
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _qwen3_next(config: Config) -> Settings:
    kinds = config.get("layer_types") or [
        "full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(config["num_hidden_layers"])
    ]
    sizes = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    return {
        **_gpt(config),
        **_softmax_experts(config),
        **_gated_shared_expert(config),
        **{f"linear_{name}": config[f"linear_{name}"] for name in sizes},
        "linear_attention_freq": tuple(int(kind == "linear_attention") for kind in kinds),
        "qk_layernorm": True,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
    }


def _nemotron_h(config: Config) -> Settings:
    pattern = _hybrid_pattern(config)
    blocks = set(pattern.main + pattern.mtp)
    found = _shared(config) | {
        "num_layers": len(pattern.main),
        "hybrid_layer_pattern": str(pattern),
        "mtp_num_layers": pattern.mtp_depths or None,
        "mtp_use_repeated_layer": bool(config.get("mtp_use_repeated_layer")),
        "layernorm_epsilon": config["layer_norm_epsilon"],
        "activation": _activation(config, "mlp_hidden_act", "relu2"),
    }
    if "*" in blocks:
        found |= {"num_query_groups": config["num_key_value_heads"], "kv_channels": config["head_dim"]}
    if "-" in blocks:
        found |= {"ffn_hidden_size": config["intermediate_size"]}
    if "M" in blocks:
        found |= {
            "mamba_num_heads": config["mamba_num_heads"],
            "mamba_head_dim": config["mamba_head_dim"],
            "mamba_state_dim": config["ssm_state_size"],
            "mamba_num_groups": config["n_groups"],
        }
    if "E" in blocks:
        shared = config.get("n_shared_experts", 1) not in (None, 0)
        found |= _sigmoid_router(config) | {
            "num_moe_experts": config["n_routed_experts"],
            "moe_shared_expert_intermediate_size": config["moe_shared_expert_intermediate_size"] if shared else None,
            "moe_latent_size": config.get("moe_latent_size") or None,
        }
    return found


def _hybrid_pattern(config: Config) -> HybridPattern:
    main = _spelled(config, "hybrid_override_pattern", listed="layers_block_type")
    mtp = _spelled(config, "mtp_hybrid_override_pattern", listed="mtp_layers_block_type")
    return HybridPattern.parse("/".join([main, *[mtp] * int(config.get("num_nextn_predict_layers") or 0)]))


def _spelled(config: Config, written: str, *, listed: str) -> str:
    """A pattern from its string or its list; ValueError if the two disagree."""
    string, names = config.get(written) or "", config.get(listed) or ()
    if unknown := sorted(set(names) - set(_SYMBOL_OF)):
        raise ValueError(f"{listed}: unknown blocks {unknown}")
    spelled = "".join(_SYMBOL_OF[name] for name in names)
    if string and spelled and string != spelled:
        raise ValueError(f"{written} {string!r} and {listed} {spelled!r} disagree")
    return string or spelled


_FAMILIES: dict[str, Callable[[Config], Settings]] = {
    "llama": _gpt,
    "mistral": _gpt,
    "mixtral": lambda c: {**_gpt(c), **_softmax_experts(c, "num_local_experts")},
    "qwen2": lambda c: {**_gpt(c), "add_qkv_bias": True},
    "qwen2_moe": _qwen2_moe,
    "qwen3": lambda c: {**_gpt(c), "qk_layernorm": True},
    "qwen3_moe": lambda c: {**_gpt(c), "qk_layernorm": True, **_softmax_experts(c)},
    "qwen3_next": _qwen3_next,
    "glm4_moe": lambda c: {**_gpt(c), "qk_layernorm": bool(c.get("use_qk_norm")), **_sigmoid_experts(c)},
    "deepseek_v3": lambda c: {**_gpt(c), **_latent_attention(c), **_sigmoid_experts(c)},
    "nemotron_h": _nemotron_h,
}
