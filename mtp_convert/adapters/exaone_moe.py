"""EXAONE-MoE (K-EXAONE): dense layers first, mixtures of experts with a router bias, a dense MTP layer.

MTP is named as in Qwen3-Next.
Names: transformers `modeling_exaone_moe.py` and its conversion; Megatron-Bridge 0.6 `ExaoneMoeBridge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number, optional
from mtp_convert.mapping.family import Config, Family
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    attention, width = q.attention(config), number(config, "moe_intermediate_size")
    return q.dims(
        config,
        depths,
        attention=attention,
        sparse=gpt.sparse_layers(config, dense=1),
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
    stored, held = "e_score_correction_bias", "gate.e_score_correction_bias"
    moe = b.respelled(b.llama_moe(d.moe, bias=stored), "native", (stored, held))
    return q.places(d, q.Kinds(b.llama_attention(d.attention), b.llama_mlp(d.mlp), moe))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    found = q.megatron_args(config, dims(config, 0), steps, repeated=repeated, score="sigmoid")
    return {**found, **windows(config)}


def windows(config: Config) -> dict[str, Any]:
    """Layers with a window have rotary positions; in a model with windows, the others have none."""
    if not config.get("sliding_window"):
        return {}
    sliding = q.sliding_layers(config)
    return {**args.window_args(config, sliding), "no_rope_freq": [int(not s) for s in sliding]}


FAMILY = Family(
    name="exaone_moe",
    model_types=("exaone_moe",),
    title="EXAONE-MoE / K-EXAONE (sliding attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    notes=(
        "The MTP layer is dense: Megatron's model needs a spec that says so, else it is of the last layer's kind.",
        "`mtp_share_layers` means that the one stored depth runs several times.",
        "Megatron-Core gives MTP layer k the window and the positions of decoder layer k, as the release has it.",
        gpt.KEPT_BIAS,
        q.SEVERAL,
        q.COLUMNS,
    ),
)
