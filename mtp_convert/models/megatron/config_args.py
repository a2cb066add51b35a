"""Model settings from the arguments that Megatron-LM stores with a checkpoint, or from its TransformerConfig."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch

from mtp_convert.models.megatron.hybrid_pattern import HybridPattern
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout

# Megatron-LM's argument -> field
_RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
}
# Settings that change the numbers and are not implemented, with the values under which they change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "experimental_attention_variant": (None, "gated_delta_net", "dsa", "dsv4_hybrid"),
    "csa_dense_mode": (None, False),
    "mhc_single_pass": (None, False),
    "softmax_type": (None, "vanilla"),
    "use_rope_scaling": (None, False),
    "rope_scaling": (None, False),
    "seq_len_interpolation_factor": (None,),
    "rotary_seq_len_interpolation_factor": (None,),
    "qk_l2_norm": (None, False),
    "use_mup": (None, False),
    "fp32_residual_connection": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "moe_apply_probs_on_input": (None, False),
    "moe_expert_capacity_factor": (None,),
    "glu_linear_offset": (None, 0, 0.0),
    "mla_down_proj_fusion": (None, False),
    "enable_mhc_connections": (None, False),
    "heterogeneous_layers_config_path": (None,),
}
_LISTS = (
    "moe_layer_freq",
    "linear_attention_freq",
    "window_size",
    "window_attn_skip_freq",
    "no_rope_freq",
    "csa_compress_ratios",
)
_ROUTINGS = ("sinkhorn", "quantile_balancing")  # load balancing that chooses experts itself


def settings(args: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """Those fields of TransformerConfig, of the `known` ones, that arguments decide.

    ValueError names all arguments that are missing or not implemented.
    """
    _refuse(args)
    found = {n: v for n, v in args.items() if n in known and v is not None}
    found |= {field: args[n] for n, field in _RENAMED.items() if args.get(n) is not None}
    found |= _attention(args) | _feed_forward(args) | _vocabulary(args) | _pattern(args) | _stages(args)
    for name in _LISTS:
        if isinstance(found.get(name), list):
            found[name] = tuple(found[name])
    if isinstance(dtype := found.get("params_dtype"), str):
        found["params_dtype"] = getattr(torch, dtype.removeprefix("torch."))
    if found.get("rotary_percent") is None and args.get("partial_rotary_factor") is not None:
        found["rotary_percent"] = args["partial_rotary_factor"]
    return found


def _refuse(args: Mapping[str, Any]) -> None:
    wrong = [f"{n}={args[n]!r}" for n, harmless in _UNSUPPORTED.items() if args.get(n) not in harmless]
    balancing = args.get("moe_router_load_balancing_type")
    wrong += [f"moe_router_load_balancing_type={b!r}" for b in _ROUTINGS if b == balancing]
    patterned = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    needed = ("hidden_size",) if patterned else ("hidden_size", "num_layers")
    problems = (
        [f"settings missing: {', '.join(missing)}"] if (missing := [n for n in needed if not args.get(n)]) else []
    )
    problems += [f"not supported here: {', '.join(wrong)}"] if wrong else []
    if problems:
        raise ValueError("; ".join(problems))


def _attention(args: Mapping[str, Any]) -> dict[str, Any]:
    heads = args.get("num_attention_heads") or 0
    # num_query_groups keeps a default that means nothing while group_query_attention is off
    groups = heads if args.get("group_query_attention") is False else args.get("num_query_groups") or heads
    size = args.get("kv_channels") or (args["hidden_size"] // heads if heads else 0)
    return {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": size}


def _feed_forward(args: Mapping[str, Any]) -> dict[str, Any]:
    """The activation: `swiglu` and `squared_relu` are switches, and GELU is what is left."""
    if args.get("activation") in ("silu", "gelu", "squared_relu"):
        activation = args["activation"]
    elif args.get("squared_relu"):
        activation = "squared_relu"
    else:
        gated = args.get("swiglu", args.get("gated_linear_unit"))
        activation = "silu" if gated else "gelu"
    return {"activation": activation}


def _vocabulary(args: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the embedding, and whether it is the output layer too; untied if nothing is said."""
    untied = args.get("untie_embeddings_and_output_weights")
    shared = args.get("share_embeddings_and_output_weights", untied is False)
    return {
        "vocab_size": args.get("padded_vocab_size") or args.get("vocab_size") or 0,
        "share_embeddings_and_output_weights": bool(shared),
    }


def _pattern(args: Mapping[str, Any]) -> dict[str, Any]:
    """The layer pattern with its MTP depths, also where an old version keeps those apart."""
    depths = args.get("mtp_num_layers") or None
    written = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    if not written:
        return {"mtp_num_layers": depths}
    if "/" not in written and args.get("mtp_hybrid_override_pattern"):
        written = "/".join([written, *[args["mtp_hybrid_override_pattern"]] * (depths or 0)])
    pattern = HybridPattern.parse(written)
    return {
        "hybrid_layer_pattern": str(pattern),
        "num_layers": args.get("num_layers") or len(pattern.main),
        "mtp_num_layers": depths or pattern.mtp_depths or None,
    }


def _stages(args: Mapping[str, Any]) -> dict[str, Any]:
    ranks, layout = args.get("pipeline_model_parallel_size") or 1, args.get("pipeline_model_parallel_layout")
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, ranks)
    return {"pipeline_model_parallel_size": ranks, "pipeline_model_parallel_layout": layout}
