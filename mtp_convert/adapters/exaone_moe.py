"""EXAONE-MoE (K-EXAONE): dense layers first, mixtures of experts with a router bias, a dense MTP layer.

MTP is named as in Qwen3-Next.
Names: transformers `modeling_exaone_moe.py` and its conversion; Megatron-Bridge 0.6 `ExaoneMoeBridge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number, optional
from mtp_convert.mapping.family import Config, Family
from mtp_convert.mapping.rules import Block, Placed, Rule

BIAS = "e_score_correction_bias"


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    attention, layers = q.attention(config), number(config, "num_hidden_layers", MOST)
    dense = optional(config, "first_k_dense_replace", MOST)
    listed = q.listed(config, "mlp_layer_types", {"sparse": True, "dense": False})
    width = number(config, "moe_intermediate_size")
    return q.dims(
        config,
        depths,
        attention=attention,
        sparse=listed or tuple(i >= dense for i in range(layers)),
        mtp_sparse=False,
        moe=b.Moe(
            attention.H,
            E=number(config, "num_experts", MOST),
            I=width,
            S=width * optional(config, "num_shared_experts", MOST),
            gated=True,
        ),
    )


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    assert d.mlp is not None
    assert d.moe is not None
    return q.places(d, q.Kinds(b.llama_attention(d.attention), b.llama_mlp(d.mlp), moe(d.moe)))


def moe(d: b.Moe) -> Block:
    """The router bias is stored beside the router, and held inside it."""
    block = b.llama_moe(d, bias=BIAS)
    held = tuple(
        replace(row, tensor=f"mlp.gate.{BIAS}") if isinstance(row, Rule) and row.params == ("router_bias",) else row
        for row in block.rows["native"]
    )
    return replace(block, rows={**block.rows, "native": held})


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    found = q.megatron_args(config, dims(config, 0), steps, repeated=repeated, score="sigmoid")
    return {**found, **windows(config)}


def windows(config: Config) -> dict[str, Any]:
    """Layers with a window have rotary positions; in a model with windows, the others have none."""
    layers = number(config, "num_hidden_layers", MOST)
    sliding = q.listed(config, "layer_types", q.SLIDING)
    if sliding is None:
        interval = optional(config, "sliding_window_pattern", MOST)
        sliding = tuple(bool(interval and (i + 1) % interval) for i in range(layers))
    if not config.get("sliding_window"):
        return {}
    return {**args.window_args(config, sliding), "no_rope_freq": [int(not s) for s in sliding]}


FAMILY = Family(
    name="exaone_moe",
    model_types=("exaone_moe",),
    title="EXAONE-MoE / K-EXAONE (sliding attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {"trunk": b.TRUNKS, "experts": ("split", "stacked")},
        "megatron": b.megatron_words(
            "wrapper", "decoder", "attention_norm", "mlp_norm", "moe_norm", "final_norm", inner="transformer_layer"
        ),
        "native": {},
    },
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider="",
    megatron_since=(0, 12),
    notes=(
        "The MTP layer is dense. `mtp_share_layers` means that the one stored depth runs several times.",
        "The router bias keeps its stored dtype under --dtype.",
        q.SEVERAL,
        q.COLUMNS,
    ),
)
