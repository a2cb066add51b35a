"""Megatron-LM training arguments (its `--use-checkpoint-args`) that follow from shared blocks and common fields."""

from __future__ import annotations

from typing import Any

from mtp_convert.adapters.blocks import Attention, Mamba, Moe
from mtp_convert.mapping.family import Config


def model_args(config: Config, *, layers: int, H: int, V: int, tied: bool) -> dict[str, Any]:
    """What every model has."""
    length = config.get("max_position_embeddings", 4096)
    return {
        "num_layers": layers,
        "hidden_size": H,
        "ffn_hidden_size": config.get("intermediate_size", 4 * H),
        "max_position_embeddings": length,
        "seq_length": length,
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("layer_norm_epsilon", config.get("rms_norm_eps", 1e-5)),
        "untie_embeddings_and_output_weights": not tied,
        "vocab_size": V,
        "padded_vocab_size": V,
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_dropout": config.get("hidden_dropout", 0.0),
    }


def attention_args(d: Attention) -> dict[str, Any]:
    """Grouped-query attention."""
    return {
        "num_attention_heads": d.Q,
        "num_query_groups": d.K,
        "group_query_attention": d.Q != d.K,
        "kv_channels": d.D,
        "add_qkv_bias": d.qkv_bias,
    }


def mamba_args(config: Config, d: Mamba | None) -> dict[str, Any]:
    """Mamba2 mixers, if there are any."""
    if d is None:
        return {}
    return {
        "mamba_num_heads": d.N,
        "mamba_head_dim": d.head,
        "mamba_state_dim": config["ssm_state_size"],
        "mamba_num_groups": config["n_groups"],
    }


def moe_args(config: Config, d: Moe | None) -> dict[str, Any]:
    """Mixtures of experts with a sigmoid router and expert bias, if there are any."""
    if d is None:
        return {}
    args: dict[str, Any] = {
        "num_experts": d.E,
        "moe_ffn_hidden_size": d.I,
        "moe_shared_expert_intermediate_size": d.S or None,
        "moe_router_topk": config.get("num_experts_per_tok", 2),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor", 1.0),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": True,
    }
    if (groups := config.get("n_group") or 1) > 1:
        args |= {"moe_router_num_groups": groups, "moe_router_group_topk": config.get("topk_group", 1)}
    if d.latent:
        args["moe_latent_size"] = d.latent
    return args


def mtp_args(steps: int, pattern: str, *, repeated: bool) -> dict[str, Any]:
    """MTP depths of a hybrid model, if there are any."""
    if not steps:
        return {}
    return {
        "mtp_num_layers": steps,
        "mtp_hybrid_override_pattern": pattern,
        "mtp_use_repeated_layer": repeated,
    }
