"""A GPTModel as the training arguments of a checkpoint describe it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron_cpu import empty_module
from torch import Tensor, nn

# Arguments that megatron-core's TransformerConfig has under the same name.
SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "qk_layernorm",
    "add_qkv_bias",
    "add_bias_linear",
    "attention_output_gate",
    "hidden_dropout",
    "attention_dropout",
    "mtp_num_layers",
    "window_size",
    "window_attn_skip_freq",
    "no_rope_freq",
    "experimental_attention_variant",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_grouped_gemm",
)
# The same of its subclass for latent attention; `dsa_...` is the indexer's.
LATENT = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
CPU = {
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "use_cpu_initialization": True,
    "deterministic_mode": True,  # the delta rule in plain torch
    "dsa_indexer_rotate_activation": False,  # changes no score, and needs bfloat16 and a CUDA package
}


def l2norm(x: Tensor) -> Tensor:
    """`fla.modules.l2norm.l2norm`."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def install_delta_rule() -> None:
    """The package that gated delta nets import; in deterministic mode only its norm is called."""
    for name in ("fla", "fla.modules", "fla.ops"):
        empty_module(name)
    empty_module("fla.modules.convolution").causal_conv1d = None
    empty_module("fla.modules.l2norm").l2norm = l2norm
    empty_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule = None


def settings(args: dict[str, Any]) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    latent = (
        [*LATENT, *(name for name in args if name.startswith("dsa_"))] if args.get("multi_latent_attention") else []
    )
    found = {name: args[name] for name in (*SAME, *latent) if args.get(name) is not None}
    found |= {"layernorm_epsilon": args["norm_epsilon"], "gated_linear_unit": args["swiglu"], "activation_func": F.silu}
    found |= {"layernorm_zero_centered_gamma": bool(args.get("apply_layernorm_1p"))}
    if args.get("num_experts"):
        found |= {"num_moe_experts": args["num_experts"], "moe_token_dispatcher_type": "allgather"}
    return found | CPU


def build(given: Namespace, *, mtp_experts: bool | None = None) -> nn.Module:
    """The model, in float32. `mtp_experts`: whether MTP layers have experts, which only a layer spec can tell."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    args = vars(given)
    config = (MLATransformerConfig if args.get("multi_latent_attention") else TransformerConfig)(**settings(args))
    if config.experimental_attention_variant:
        layers = variants.get_transformer_block_with_experimental_attention_variant_spec(config)
    else:
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    mtp = layers
    if mtp_experts is False and config.num_moe_experts:
        mtp = get_gpt_decoder_block_spec(replace(config, num_moe_experts=None), use_transformer_engine=True)
    return GPTModel(
        config,
        layers,
        mtp_block_spec=get_gpt_mtp_block_spec(config, mtp, use_transformer_engine=True),
        vocab_size=args["vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        parallel_output=False,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        rotary_percent=args["rotary_percent"],
    )
