"""Qwen3.5 and Qwen3.6, dense and mixture of experts: Qwen3-Next with the projections of a delta net kept apart.

Releases are vision-language models: the language model is below `model.language_model.`, but MTP always `mtp.`. Experts
are stacked, those of MTP one by one in Qwen3.5 and stacked in Qwen3.6.
Names: transformers `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py` and the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import depth_field
from mtp_convert.adapters._gpt import TOWER
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json; it is dense without `num_experts`."""
    if config.get("mtp_use_dedicated_embeddings"):
        raise ConfigError("mtp_use_dedicated_embeddings: no release shows what an embedding of MTP's own is called")
    attention, linear = q.attention(config, gated=True), q.linear_layers(config)
    moe = q.gated_moe(config, attention.H) if config.get("num_experts") else None
    return q.dims(
        config,
        depths,
        attention=attention,
        linear=linear,
        sparse=(moe is not None,) * len(linear),
        mtp_sparse=moe is not None,
        moe=moe,
    )


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    return q.places(d, q.gated_kinds(d, by_head=False))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    return q.gated_args(config, dims(config, 0), steps, repeated=repeated)


FAMILY = Family(
    name="qwen3_5",
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    title="Qwen3.5 / Qwen3.6, dense and MoE (gated delta net, gated attention)",
    dims=dims,
    places=places,
    choices=q.gated_choices(experts=("stacked", "split")),
    depths=depth_field("mtp_num_hidden_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    nested=q.NESTED,
    megatron_since=(0, 16),
    released=Released((1,), ("bf16", "fp8", "nvfp4")),
    notes=(
        TOWER,
        q.DELTA_NORM,
        q.SEVERAL,
        q.COLUMNS,
    ),
)
