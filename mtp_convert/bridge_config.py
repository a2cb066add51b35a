"""run_config.yaml, by which Megatron-Bridge recognises a checkpoint and builds its model.

Derived from the training arguments, so the two cannot disagree; where a provider has no field for one of them there is
no file. Field names: Megatron-Bridge 0.6 providers, which are dataclasses over Megatron-Core's TransformerConfig. The
file is written as JSON, which every YAML reader reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HYBRID, GPT, MLA = "HybridModelProvider", "GPTModelProvider", "MLAModelProvider"
SPECS = "megatron.core.models.gpt"  # where GPT models get their layers from
# argument -> provider field, where the two have different names
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
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
# the same, of models whose layers are no pattern
OF_GPT = (
    "num_layers",
    "rotary_base",
    "rotary_percent",
    "qk_layernorm",
    "attention_output_gate",
    "moe_layer_freq",
    "moe_shared_expert_gate",
    "virtual_pipeline_model_parallel_size",
)
# the same, of latent attention, and of its indexer
OF_MLA = (
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "experimental_attention_variant",
    "dsa_indexer_n_heads",
    "dsa_indexer_head_dim",
    "dsa_indexer_topk",
    "dsa_indexer_rope_interleaved",
    "dsa_indexer_rotate_activation",
    "dsa_indexer_k_norm_epsilon",
    "dsa_indexer_topk_freq",
    "dsa_indexer_skip_topk_offset",
)
FIELDS = {HYBRID: SAME, GPT: (*SAME, *OF_GPT), MLA: (*SAME, *OF_GPT, *OF_MLA)}
# arguments that other fields say, or that follow from them
SAID = frozenset(
    {
        "untie_embeddings_and_output_weights",
        "padded_vocab_size",
        "swiglu",
        "squared_relu",
        "hybrid_layer_pattern",
        "max_position_embeddings",
        "add_position_embedding",
        "use_rotary_position_embeddings",
        "group_query_attention",
        "ckpt_format",
    }
)
# the same of a hybrid model: its pattern says the layers and its class their specification
SAID_BY_PATTERN = ("num_layers", "rotary_base", "rotary_percent", "hybrid_override_pattern", "spec")


def unsaid(provider: str, args: Mapping[str, Any]) -> list[str]:
    """Arguments that say something of the model and that the provider has no field for."""
    kind = provider.rpartition(".")[2]
    known = {*FIELDS[kind], *RENAMED, *SAID, *(SAID_BY_PATTERN if kind == HYBRID else ())}
    return sorted(name for name, value in args.items() if value and name not in known)


def run_config(provider: str, args: Mapping[str, Any], *, torch_dtype: str) -> bytes | None:
    """The file for a model of class `provider` (dotted path) whose weights are mostly `torch_dtype`.

    None where the class cannot say what the arguments say.
    """
    if unsaid(provider, args):
        return None
    kind = provider.rpartition(".")[2]
    model: dict[str, Any] = {"_target_": provider}
    model |= {name: args[name] for name in FIELDS[kind] if args.get(name) is not None}
    model |= {field: args[name] for name, field in RENAMED.items() if args.get(name) is not None}
    model["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    model["should_pad_vocab"] = args["padded_vocab_size"] != args["vocab_size"]
    model["gated_linear_unit"] = bool(args["swiglu"])
    if args.get("squared_relu"):
        model["activation_func"] = _named("megatron.core.activations.squared_relu")
    elif args["swiglu"]:
        model["activation_func"] = _named("torch.nn.functional.silu")
    if args.get("hybrid_layer_pattern"):
        # The provider appends the MTP pattern once per depth itself.
        model["hybrid_layer_pattern"] = str(args["hybrid_layer_pattern"]).partition("/")[0]
    if kind == MLA:
        model["q_lora_rank"] = args["q_lora_rank"]  # None means no low rank; left out, it would be 512
    if kind != HYBRID:
        model["transformer_layer_spec"] = _layers(args)
    for field in ("params_dtype", "pipeline_dtype"):
        model[field] = _named(f"torch.{torch_dtype}")
    model["bf16"], model["fp16"] = torch_dtype == "bfloat16", torch_dtype == "float16"
    saved = {"save_rng": False, "save_optim": False, "fully_parallel_save": False}
    config = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": model,
        "checkpoint": {"_target_": "megatron.bridge.training.config.CheckpointConfig", **saved},
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _named(name: str) -> dict[str, Any]:
    """A function or a type itself, not what a call of it gives."""
    return {"_target_": name, "_call_": False}


def _layers(args: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the layers of a GPT model, some of which may be dense and others mixtures of experts."""
    if args.get("experimental_attention_variant"):
        place = f"{SPECS}.experimental_attention_variant_module_specs"
        return _named(f"{place}.get_transformer_block_with_experimental_attention_variant_spec")
    name = f"{SPECS}.gpt_layer_specs.get_gpt_decoder_block_spec"
    return {"_target_": name, "_partial_": True, "use_transformer_engine": True}
