"""The real Megatron-Core's model of a checkpoint, made from its training arguments; and the process that it needs.

Nothing is imported from `megatron` before it is asked for: the package is no requirement of this one.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mtp_convert.models.megatron.hybrid_pattern import MAMBA, HybridPattern

# Megatron-LM's argument -> field of TransformerConfig
_RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
}
# Megatron-LM's argument -> argument of every model's constructor, and of GPTModel's alone
_OF_MODELS = {
    "max_position_embeddings": "max_sequence_length",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
_OF_GPT = {"use_rope_scaling": "rope_scaling", "rope_scaling_factor": "rope_scaling_factor"}
# How the fields begin that say how training was done, not what was trained: memory, speed, parallel jobs, fp8.
_HOW = (
    *("recompute", "moe_layer_recompute", "distribute_saved", "cpu_offloading", "fine_grained_", "offload"),
    *("cuda_graph", "enable_cuda_graph", "external_cuda_graph", "inference", "flash_", "attention_backend"),
    *("fp8", "fp4", "first_last_layers_bf16", "num_layers_at_", "moe_router_padding", "quant_recipe", "use_kitchen"),
    *("moe_token_dispatcher", "moe_flex", "moe_enable_deepep", "moe_deepep", "moe_hybridep", "moe_ncclep"),
    *("moe_paged", "num_layers_in_", "pipeline_", "account_for_", "cp_comm_type", "symmetric_ar", "persist_layer_norm"),
    *("init_m", "embedding_init", "output_layer_init", "transformer_impl", "use_te_", "config_logger", "test_mode"),
)
_KINDS_OF_HOW = ("_fusion", "_overlap", "_fused", "_op_fuser")  # how more of them end
_PLAIN = (bool, int, float, str, list, tuple)
# One process, on a CPU as well as on a GPU, and the same numbers on both.
_HERE = {
    "use_cpu_initialization": True,  # of memory that is never touched
    "perform_initialization": False,
    "moe_token_dispatcher_type": "allgather",
    "dsa_indexer_rotate_activation": False,  # turns queries and keys alike, for 8 bits; needs a kernel for CUDA
}


def engine_installed() -> bool:
    """Whether layers can be TransformerEngine's; ImportError if there is no Megatron-Core that works."""
    with warnings.catch_warnings(action="ignore"):  # packages that it would like to have
        from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """A job of one process for a model on `device`; ValueError if this process is in a job already."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch._C._distributed_c10d import HashStore  # torch.distributed has it, and does not export it

    if dist.is_initialized():
        raise ValueError("this process belongs to a job of torch.distributed; Megatron-Core needs one of its own")
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if device.type == "cpu":  # Megatron-Core asks for CUDA's device, and puts there what is on no device yet
            stack.enter_context(_replaced(torch.cuda, "current_device", lambda: "cpu"))
        else:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(_replaced(CudaRNGStatesTracker, "fork", lambda *_: nullcontext()))  # nothing draws numbers
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_replaced(sys, "excepthook", sys.excepthook))  # a job sets its own
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice on how to train."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _replaced(owner: object, name: str, value: Callable[..., object]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def build(
    args: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    engine: bool,
    vocab: int,
    mtp_experts: bool | None,
) -> nn.Module:
    """The model that training arguments describe, with `vocab` tokens; its weights mean nothing.

    engine: with TransformerEngine's layers, else with Megatron-Core's own. mtp_experts: whether MTP layers have
    experts, if there are any; no argument tells.
    """
    found = settings(args) | _HERE | {"params_dtype": dtype, "deterministic_mode": device.type == "cpu"}
    found |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    found |= {"transformer_impl": "transformer_engine" if engine else "local"}
    pattern = layer_pattern(args)
    names = _OF_MODELS if pattern is not None else _OF_MODELS | _OF_GPT
    common = {
        "vocab_size": vocab,
        "max_sequence_length": 4096,
        "parallel_output": False,
        "share_embeddings_and_output_weights": args.get("untie_embeddings_and_output_weights") is False,
        **{name: args[argument] for argument, name in names.items() if args.get(argument) is not None},
    }
    if pattern is not None:
        return _hybrid_model(found, pattern, common)
    return _gpt_model(found, common, engine=engine, mtp_experts=mtp_experts)


def settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig that arguments decide, of the installed release."""
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.model_parallel_config import ModelParallelConfig

    known = {f.name for f in fields(_config_class(args))} - {f.name for f in fields(ModelParallelConfig)}
    known = {n for n in known if not n.startswith(_HOW) and not n.endswith(_KINDS_OF_HOW)}
    given = {_RENAMED.get(name, name): value for name, value in args.items() if isinstance(value, _PLAIN)}
    found: dict[str, Any] = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if name in known}
    if args.get("group_query_attention") is False:  # the number then keeps a default without meaning
        found.pop("num_query_groups", None)
    if args.get("swiglu"):
        found["activation_func"] = F.silu
    elif args.get("quick_geglu"):
        found |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    elif args.get("squared_relu"):
        found["activation_func"] = squared_relu
    return found


def layer_pattern(args: Mapping[str, Any]) -> HybridPattern | None:
    """The layers of a hybrid model and of its MTP depths; None for a GPT model. ValueError if it is none."""
    written = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    if not written:
        return None
    pattern, depths = HybridPattern.parse(written), args.get("mtp_num_layers") or 0
    mtp = pattern.mtp or args.get("mtp_hybrid_override_pattern") or ""
    return HybridPattern((pattern.main,), mtp, (depths or pattern.mtp_depths) if mtp else 0)


def _config_class(args: Mapping[str, Any]) -> type[Any]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    found: type[Any] = MLATransformerConfig if args.get("multi_latent_attention") else TransformerConfig
    return found


def _gpt_model(
    found: dict[str, Any], common: Mapping[str, Any], *, engine: bool, mtp_experts: bool | None
) -> nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = _config_class(found)(**found)
    layers = _layers(config, engine=engine)
    like_last = layers
    if mtp_experts is not None and config.num_moe_experts:
        freq = {"moe_layer_freq": 1} if mtp_experts else {"num_moe_experts": None}
        like_last = _layers(replace(config, **freq), engine=engine)
    mtp = get_gpt_mtp_block_spec(config, like_last, use_transformer_engine=engine) if config.mtp_num_layers else None
    model: nn.Module = GPTModel(config, layers, mtp_block_spec=mtp, **common)
    return model


def _layers(config: Any, *, engine: bool) -> Any:  # noqa: ANN401 - Megatron-Core's types
    """The specification of the decoder's layers."""
    if config.experimental_attention_variant is None:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(
            config, engine, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
        )
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants

    if not engine:
        raise ModuleNotFoundError(f"{config.experimental_attention_variant} has layers of transformer-engine alone")
    return variants.get_transformer_block_with_experimental_attention_variant_spec(config)


def _hybrid_model(found: dict[str, Any], pattern: HybridPattern, common: Mapping[str, Any]) -> nn.Module:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    found |= {"num_layers": len(pattern.main), "is_hybrid_model": True, "mtp_num_layers": pattern.mtp_depths or None}
    config = _config_class(found)(**found)
    model: nn.Module = HybridModel(config, hybrid_stack_spec, hybrid_layer_pattern=str(pattern), **common)
    return model


def missing_for(pattern: HybridPattern | None, *, engine: bool) -> tuple[str, ...]:
    """Packages that a model with this pattern needs and that are not installed."""
    if pattern is None:
        return ()
    from importlib.util import find_spec

    needs_mamba = MAMBA in pattern.main + pattern.mtp and find_spec("mamba_ssm") is None
    return (*(() if engine else ("transformer-engine",)), *(("mamba-ssm",) if needs_mamba else ()))
