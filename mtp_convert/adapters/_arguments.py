"""Megatron-LM training arguments (its `--use-checkpoint-args`) that follow from shared blocks and common fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtp_convert.adapters._config import number, partial_rotary, rope_scaling, rope_theta
from mtp_convert.adapters.blocks import Attention, DeltaNet, Mamba, Mla, Moe
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
        "qk_layernorm": d.qk_norm,
        "attention_output_gate": d.gated,
    }


def gpt_args(config: Config) -> dict[str, Any]:
    """What the gated, rotary decoders after Llama have in common."""
    return {
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": rope_theta(config),
        "rotary_percent": partial_rotary(config),
        "add_bias_linear": False,
        "swiglu": True,
    }


def mla_args(config: Config, d: Mla) -> dict[str, Any]:
    """Multi-head latent attention with its own rotary scaling, and the indexer of sparse attention."""
    scaling = rope_scaling(config)
    args: dict[str, Any] = {
        "multi_latent_attention": True,
        "num_attention_heads": d.Q,
        "num_query_groups": d.Q,
        "kv_channels": d.N + d.R,
        "qk_layernorm": True,
        "q_lora_rank": d.A,
        "kv_lora_rank": d.B,
        "qk_head_dim": d.N,
        "qk_pos_emb_head_dim": d.R,
        "v_head_dim": d.V,
        "rope_type": "yarn" if scaling else "rope",
        "rotary_percent": 1.0,
        "rotary_scaling_factor": float(scaling.get("factor", 1.0)),
    }
    if scaling:
        fields = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        args |= {f: scaling[f] for f in fields if f in scaling}
    if d.indexer is not None:
        args |= {
            "experimental_attention_variant": "dsa",
            "dsa_indexer_n_heads": d.indexer.X,
            "dsa_indexer_head_dim": d.indexer.Y,
            "dsa_indexer_topk": number(config, "index_topk"),
        }
    return args


def gpt_mtp_args(steps: int, *, repeated: bool) -> dict[str, Any]:
    """MTP depths of a GPT model, if there are any."""
    return {"mtp_num_layers": steps, "mtp_use_repeated_layer": repeated} if steps else {}


def delta_args(d: DeltaNet | None, linear: Sequence[bool]) -> dict[str, Any]:
    """Gated delta nets in the layers that are `linear`, if there are any."""
    if d is None:
        return {}
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(x) for x in linear],
        "linear_num_key_heads": d.K,
        "linear_num_value_heads": d.V,
        "linear_key_head_dim": d.D,
        "linear_value_head_dim": d.E,
        "linear_conv_kernel_dim": d.W,
    }


def window_args(config: Config, sliding: Sequence[bool]) -> dict[str, Any]:
    """Attention to the last tokens only, in the layers that are `sliding`."""
    window = config.get("sliding_window")
    if not window or not any(sliding):
        return {}
    return {"window_size": [window - 1, 0], "window_attn_skip_freq": [int(x) for x in sliding]}


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


def moe_args(config: Config, d: Moe | None, *, score: str = "sigmoid") -> dict[str, Any]:
    """Mixtures of experts, if there are any; `score` is the router's function."""
    if d is None:
        return {}
    args: dict[str, Any] = {
        "num_experts": d.E,
        "moe_ffn_hidden_size": d.I,
        "moe_shared_expert_intermediate_size": d.S or None,
        "moe_router_topk": config.get("num_experts_per_tok", 2),
        "moe_router_score_function": score,
        "moe_router_enable_expert_bias": d.router_bias,
        "moe_shared_expert_gate": d.shared_gate,
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor") or 1.0,
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
