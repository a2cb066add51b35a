"""Ling 2.0 (bailing_moe_v2): a decoder with grouped-query attention and experts, MTP as one more layer.

Names: the released modelling code, which Megatron-Bridge 0.6 carries, and its `BailingMoeV2Bridge`. transformers has no
such class: the native tree has Llama's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _bailing as ling
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import depth_field
from mtp_convert.mapping.family import Config, Family, Released
from mtp_convert.mapping.rules import Placed

Dims = gpt.Dims[b.Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    ling.refuse_biases(config)
    attention = gpt.gqa(
        config, qkv_bias=bool(config.get("use_qkv_bias")), qk_norm=bool(config.get("use_qk_norm", True))
    )
    sparse = gpt.sparse_layers(config, ling.FIRST_SPARSE)
    biased = bool(config.get("moe_router_enable_expert_bias", True))
    return gpt.dims(config, depths, attention=attention, sparse=sparse, moe=ling.experts(config, router_bias=biased))


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield from ling.places(d, ling.fused_attention(d.attention))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return gpt.megatron_args(config, d, steps, repeated=repeated, attention=args.attention_args(d.attention))


FAMILY = Family(
    name="bailing_moe",
    model_types=("bailing_moe_v2",),
    title="Ling 2.0 (MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=gpt.megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.GPT_PROVIDER,
    megatron_since=(0, 12),
    released=Released((0, 1)),
    unproven="transformers has no such model",
    notes=(ling.FUSED, gpt.COLUMNS, "The embedding and the head are the main model's.", gpt.KEPT_BIAS),
)
