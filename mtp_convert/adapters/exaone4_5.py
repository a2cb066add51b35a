"""EXAONE 4.5's language model, and EXAONE 4.0: dense, with the norms behind attention and MLP, MTP with Qwen's names.

Names: transformers `modeling_exaone4.py`, `modeling_exaone4_5.py`; Megatron-Bridge 0.6 `Exaone45Bridge`, whose linear
layers hold the norm behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number
from mtp_convert.adapters._gpt import TOWER
from mtp_convert.adapters.exaone_moe import windows
from mtp_convert.mapping.family import Config, Family
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    layers = number(config, "num_hidden_layers", MOST)
    attention = q.attention(config, post_norm=True)
    return q.dims(config, depths, attention=attention, sparse=(False,) * layers, mtp_sparse=False)


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    assert d.mlp is not None
    attention = b.llama_attention(d.attention, norm="post_attention_layernorm")
    return q.places(d, q.Kinds(attention, b.llama_mlp(d.mlp, norm="post_feedforward_layernorm")))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    found = q.megatron_args(config, dims(config, 0), steps, repeated=repeated)
    return {**found, **windows(config)}


FAMILY = Family(
    name="exaone4_5",
    model_types=("exaone4", "exaone4_5_text"),
    title="EXAONE 4.5, EXAONE 4.0 (dense, post-norm)",
    dims=dims,
    places=places,
    choices=b.choices("wrapper", "decoder", "final_norm"),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    forms=b.MEGATRON_FORMS,
    nested=q.NESTED,
    megatron_since=(0, 12),
    unproven="Megatron-Core alone has no norm behind a linear layer",
    notes=(
        "Megatron-Core alone has no norm behind a linear layer: these are the names of Megatron-Bridge.",
        TOWER,
        q.SEVERAL,
        q.COLUMNS,
    ),
)
