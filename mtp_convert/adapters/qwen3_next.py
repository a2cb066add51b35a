"""Qwen3-Next: gated delta nets, every fourth layer gated attention, mixtures of experts with a gated shared expert.

Released configs say nothing about MTP: what is stored counts. All norms count their weight from 0, in Hugging Face and
in Megatron, but for the output norm of a delta net, which Hugging Face counts from 1.
Names: transformers `modeling_qwen3_next.py` and the released checkpoints; Megatron-Core 0.19 `GPTModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, number, optional, silent_depth_field
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    attention, sparse = q.attention(config, gated=True), sparse_layers(config)
    moe = q.gated_moe(config, attention.H) if any(sparse) else None
    return q.dims(
        config,
        depths,
        attention=attention,
        linear=q.linear_layers(config),
        sparse=sparse,
        mtp_sparse=moe is not None,
        moe=moe,
    )


def sparse_layers(config: Config) -> tuple[bool, ...]:
    """Which layers have experts."""
    layers, step = number(config, "num_hidden_layers", MOST), optional(config, "decoder_sparse_step", MOST) or 1
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers must be a list, got {dense!r}")
    experts = bool(config.get("num_experts"))
    return tuple(experts and i not in dense and (i + 1) % step == 0 for i in range(layers))


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    return q.places(d, q.gated_kinds(d, by_head=True))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    return q.gated_args(config, dims(config, 0), steps, repeated=repeated)


FAMILY = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    title="Qwen3-Next (gated delta net, gated attention, MoE)",
    dims=dims,
    places=places,
    choices=q.gated_choices(experts=("split", "stacked")),
    depths=silent_depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 16),
    released=Released((1,), ("bf16", "fp8", "nvfp4")),
    notes=(
        "Released configs do not mention MTP: a folder may have one depth or none.",
        q.DELTA_NORM,
        q.SEVERAL,
        q.COLUMNS,
    ),
)
