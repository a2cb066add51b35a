"""Mellum 2: sliding and full attention, mixtures of experts, one MTP layer with Qwen's names.

Names: transformers `modeling_mellum.py` and its MTP conversion. No Megatron stack has the model; the Megatron names are
those that Megatron-Core gives its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    attention = q.attention(config)
    mtp = config.get("mtp_mlp_layer_types") or ["sparse"]
    if mtp not in (kinds := [[kind] for kind in gpt.SPARSE]):
        raise ConfigError(f"mtp_mlp_layer_types must be {' or '.join(map(str, kinds))}, got {mtp!r}")
    return q.dims(
        config,
        depths,
        attention=attention,
        sparse=gpt.sparse_layers(config),
        mtp_sparse=gpt.SPARSE[mtp[0]],
        moe=b.Moe(
            attention.H,
            E=number(config, "num_local_experts" if "num_local_experts" in config else "num_experts", MOST),
            I=number(config, "moe_intermediate_size"),
            S=0,
            gated=True,
            router_bias=False,
        ),
    )


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    assert d.moe is not None
    mlp = b.llama_mlp(d.mlp) if d.mlp else None
    return q.places(d, q.Kinds(b.llama_attention(d.attention), mlp, b.llama_moe(d.moe)))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    rope = config.get("rope_parameters") or {}
    found = q.megatron_args(
        {**config, "rope_parameters": rope.get("full_attention", rope)}, d, steps, repeated=repeated
    )
    return {**found, **args.window_args(config, q.sliding_layers(config))}


FAMILY = Family(
    name="mellum",
    model_types=("mellum",),
    title="Mellum 2 (sliding attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    notes=(
        "Megatron names are ours: no Megatron stack has this model; its one rotary base is that of full attention.",
        "Megatron-Core gives MTP layer k the window of decoder layer k, whatever `mtp_layer_types` says; one whose MLP "
        "is not of the last layer's kind needs a spec that says so.",
        q.SEVERAL,
        q.COLUMNS,
    ),
)
