"""GLM-4.7-Flash: DeepSeek-V3's latent attention and MTP names in a GLM config.

Names: transformers `modeling_glm4_moe_lite.py`; Megatron-Bridge 0.6 `GLM47FlashBridge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import depth_field
from mtp_convert.mapping.family import Config, Family
from mtp_convert.mapping.rules import Placed

FIRST_SPARSE = 1  # where the config does not say which layers have experts

Dims = gpt.Dims[b.Mla]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    sparse = gpt.sparse_layers(config, FIRST_SPARSE)
    return gpt.dims(config, depths, attention=gpt.mla(config), sparse=sparse, moe=gpt.experts(config))


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield from gpt.places(d, b.deepseek_mla(d.attention), b.llama_moe(d.moe) if d.moe else None)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return gpt.megatron_args(config, d, steps, repeated=repeated, attention=args.mla_args(config, d.attention))


FAMILY = Family(
    name="glm4_moe_lite",
    model_types=("glm4_moe_lite",),
    title="GLM-4.7-Flash (latent attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.LATENT_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=gpt.megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.MLA_PROVIDER,
    megatron_since=(0, 12),
    notes=(gpt.COLUMNS, gpt.LATENT, gpt.COPIES, gpt.KEPT_BIAS),
)
