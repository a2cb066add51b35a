"""GLM-4.5 / 4.6 / 4.7, GLM-4.5-Air (without norms of queries and keys), and the language model of GLM-4.5V / 4.6V.

MTP is stored as in DeepSeek-V3: one more decoder layer, with copies of the main embedding and head.
Names: transformers `modeling_glm4_moe.py`, `modeling_glm4v_moe.py`; Megatron-Bridge 0.6 `GLM45Bridge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import silent_depth_field
from mtp_convert.mapping.family import Config, Family, Released
from mtp_convert.mapping.rules import Placed

VISION = "glm4v_moe_text"
FIRST_SPARSE = 1  # where the config does not say which layers have experts
ROTARY = {"partial_rotary_factor": 0.5}

Dims = gpt.Dims[b.Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json; where it says nothing of biases, only the vision-language models have them."""
    biased = config.get("attention_bias", config.get("model_type") == VISION)
    attention = gpt.gqa(config, qkv_bias=bool(biased), qk_norm=bool(config.get("use_qk_norm")))
    sparse = gpt.sparse_layers(config, FIRST_SPARSE)
    return gpt.dims(config, depths, attention=attention, sparse=sparse, moe=gpt.experts(config))


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield from gpt.places(d, b.llama_attention(d.attention), b.llama_moe(d.moe) if d.moe else None)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return gpt.megatron_args(
        {**ROTARY, **config}, d, steps, repeated=repeated, attention=args.attention_args(d.attention)
    )


FAMILY = Family(
    name="glm4_moe",
    model_types=("glm4_moe", VISION),
    title="GLM-4.5 / 4.6 / 4.7 / Air, GLM-4.5V's language model (MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=silent_depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=gpt.megatron_words,
    forms=b.MEGATRON_FORMS,
    nested={"trunk": "model.language_model."},
    bridge_provider=gpt.GPT_PROVIDER,
    megatron_since=(0, 12),
    released=Released((1,), ("bf16", "fp8")),
    notes=(gpt.COLUMNS, gpt.COPIES, gpt.TOWER, gpt.KEPT_BIAS),
)
