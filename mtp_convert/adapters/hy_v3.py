"""HY-V3 (Hy3): grouped-query attention with norms of queries and keys, experts, MTP as one more layer.

Names: the released checkpoints, as vLLM and SGLang read them; transformers `modeling_hy_v3.py`; Megatron-Bridge 0.6
`HYV3Bridge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import depth_field, either
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Placed

FIRST_SPARSE = 1  # where the config does not say which layers have experts
RELEASED = (("mlp.gate.weight", "mlp.router.gate.weight"), ("mlp.shared_experts.", "mlp.shared_mlp."))

Dims = gpt.Dims[b.Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    if biased := [field for field in ("attention_bias", "mlp_bias") if config.get(field)]:
        raise ConfigError(f"{' and '.join(biased)}: no released model of this class has biases")
    width = either(config, "moe_intermediate_size", "expert_hidden_dim")
    moe = gpt.experts({**config, "moe_intermediate_size": width}, "num_experts", "num_shared_experts")
    attention = gpt.gqa(config, qk_norm=bool(config.get("qk_norm", True)))
    return gpt.dims(config, depths, attention=attention, sparse=gpt.sparse_layers(config, FIRST_SPARSE), moe=moe)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    moe = b.llama_moe(d.moe, bias="e_score_correction_bias") if d.moe else None
    if moe:
        moe = b.respelled(moe, "hf", *RELEASED, ("mlp.e_score_correction_bias", "mlp.expert_bias"))
    yield from gpt.places(d, b.llama_attention(d.attention), moe, final="final_layernorm", copies=False)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    found = {**config, "routed_scaling_factor": config.get("router_scaling_factor")}
    return gpt.megatron_args(found, d, steps, repeated=repeated, attention=args.attention_args(d.attention))


FAMILY = Family(
    name="hy_v3",
    model_types=("hy_v3",),
    title="HY-V3 / Hy3 (MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=gpt.megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.GPT_PROVIDER,
    megatron_since=(0, 12),
    notes=(
        "The norm behind an MTP layer is final_layernorm; mcore-bridge 1.6 looks for shared_head.norm, and misses it.",
        "The embedding and the head are the main model's.",
        gpt.COLUMNS,
        gpt.KEPT_BIAS,
    ),
)
