"""A HybridModel as a Hugging Face `config.json` of Nemotron-H describes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}
Config = dict[str, Any]


def squared_relu(x: Tensor) -> Tensor:
    """megatron-core recognises activations by function, and this one has to be passed in."""
    return F.relu(x).square()


def pattern(config: Config, string: str, names: str) -> str:
    """One letter per block, from the string form or the list form."""
    return config.get(string) or "".join(SYMBOLS[name] for name in config.get(names) or [])


def depth_count(config: Config, mtp_num_layers: int | None) -> int:
    """MTP steps to run: as asked, or as many as the config counts stored depths."""
    return (config.get("num_nextn_predict_layers") or 0) if mtp_num_layers is None else mtp_num_layers


def moe_settings(config: Config) -> Config:
    """The router and expert half of the TransformerConfig."""
    shared = config.get("moe_shared_expert_intermediate_size")
    settings: Config = {
        "num_moe_experts": config["n_routed_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared or config["moe_intermediate_size"] * config["n_shared_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": True,
    }
    if (config.get("n_group") or 1) > 1:
        settings |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    if config.get("moe_latent_size"):
        settings["moe_latent_size"] = config["moe_latent_size"]
    return settings


def base_settings(config: Config, dtype: torch.dtype) -> Config:
    """Sizes of everything but the experts, and what a CPU without fused kernels needs."""
    return {
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "mamba_num_heads": config["mamba_num_heads"],
        "mamba_head_dim": config["mamba_head_dim"],
        "mamba_state_dim": config["ssm_state_size"],
        "mamba_num_groups": config["n_groups"],
        "is_hybrid_model": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation_func": squared_relu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }


def build(
    config: Config,
    dtype: torch.dtype,
    depths: int,
    repeated: bool,
    sizes: dict[str, int],
    *,
    layer_pattern: str | None = None,
    vp_stage: int | None = None,
) -> nn.Module:
    """The model of this process, or of one of its virtual pipeline stages; `sizes` are tp, pp, ep, etp and vpp."""
    from megatron.core import parallel_state
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert config["model_type"] == "nemotron_h"
    assert config.get("conv_kernel", 4) == 4, "megatron-core has no other width"
    main = pattern(config, "hybrid_override_pattern", "layers_block_type")
    mtp = pattern(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    settings = base_settings(config, dtype) | {
        "num_layers": len(main),
        "tensor_model_parallel_size": sizes["tp"],
        "pipeline_model_parallel_size": sizes["pp"],
        "expert_model_parallel_size": sizes["ep"],
        "expert_tensor_parallel_size": sizes.get("etp") or sizes["tp"],
        "virtual_pipeline_model_parallel_size": sizes.get("vpp"),
        "sequence_parallel": sizes["tp"] > 1 and sizes["ep"] > 1,
        "mtp_num_layers": depths or None,
        "mtp_use_repeated_layer": repeated,
    }
    if "E" in main or (depths and "E" in mtp):
        settings |= moe_settings(config)
    return HybridModel(
        TransformerConfig(**settings),
        hybrid_stack_spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=config.get("max_position_embeddings", 4096),
        hybrid_layer_pattern=layer_pattern or "/".join([main, *[mtp] * depths]),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        parallel_output=False,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings")),
        position_embedding_type="none",
        vp_stage=vp_stage,
    )


def randomise(model: nn.Module, seed: int) -> None:
    """Values that a wrong mapping cannot hide behind: no norm is one, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("expert_bias"))]
    for name, value in named:
        noise = torch.randn(value.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            noise = noise.abs() + 0.1
        elif leaf == "dt_bias":
            noise = 0.5 * noise - 2
        elif leaf == "D" or (value.dim() == 1 and "norm" in name):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.15 * noise
        value.data.copy_(noise)


def run(model: nn.Module, tokens: Tensor, depths: int) -> dict[str, Tensor]:
    """Logits and hidden states of the backbone and of every MTP depth, batch first."""
    seen: dict[str, Tensor] = {}
    model.decoder.register_forward_hook(lambda _m, _i, out: seen.update(hidden=out))
    if depths:
        model.mtp.register_forward_hook(lambda _m, _i, out: seen.update(mtp=out))
    length = tokens.shape[1]
    positions = torch.arange(length).expand(tokens.shape).contiguous()
    later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    model.eval()
    with torch.no_grad():
        found = {"tokens": tokens, "logits": model(tokens, positions, later), "hidden": seen["hidden"].transpose(0, 1)}
        # The MTP block returns its input and every depth's output, one after the other along the sequence.
        for depth, hidden in enumerate(seen["mtp"].chunk(depths + 1)[1:] if depths else ()):
            found[f"hidden_mtp{depth}"] = hidden.transpose(0, 1)
            found[f"logits_mtp{depth}"] = model.output_layer(hidden, weight=tied)[0].transpose(0, 1)
    return {name: value.detach().contiguous() for name, value in found.items()}
