"""run_config.yaml, by which Megatron-Bridge recognises a checkpoint and builds its model.

Derived from the training arguments, so the two cannot disagree. Field names: Megatron-Bridge 0.6 providers, which are
dataclasses over Megatron-Core's TransformerConfig. The file is written as JSON, which every YAML reader reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# argument -> provider field, where the two have different names
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
}
# arguments that the provider takes under the same name
SAME = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "position_embedding_type",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "attention_dropout",
    "hidden_dropout",
    "vocab_size",
    "is_hybrid_model",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_load_balancing_type",
    "moe_router_dtype",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_grouped_gemm",
    "moe_latent_size",
    "mtp_num_layers",
    "mtp_hybrid_override_pattern",
    "mtp_use_repeated_layer",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def run_config(provider: str, args: Mapping[str, Any], *, torch_dtype: str) -> bytes:
    """The file for a model of class `provider` (dotted path) whose weights are mostly `torch_dtype`."""
    model: dict[str, Any] = {"_target_": provider}
    model |= {name: args[name] for name in SAME if args.get(name) is not None}
    model |= {field: args[name] for name, field in RENAMED.items() if args.get(name) is not None}
    model["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    model["should_pad_vocab"] = args["padded_vocab_size"] != args["vocab_size"]
    model["gated_linear_unit"] = bool(args["swiglu"])
    if args.get("squared_relu"):
        model["activation_func"] = {"_target_": "megatron.core.activations.squared_relu", "_call_": False}
    if args.get("hybrid_layer_pattern"):
        # The provider appends the MTP pattern once per depth itself.
        model["hybrid_layer_pattern"] = str(args["hybrid_layer_pattern"]).partition("/")[0]
    for field in ("params_dtype", "pipeline_dtype"):
        model[field] = {"_target_": f"torch.{torch_dtype}", "_call_": False}
    model["bf16"], model["fp16"] = torch_dtype == "bfloat16", torch_dtype == "float16"
    saved = {"save_rng": False, "save_optim": False, "fully_parallel_save": False}
    config = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": model,
        "checkpoint": {"_target_": "megatron.bridge.training.config.CheckpointConfig", **saved},
    }
    return (json.dumps(config, indent=2) + "\n").encode()
