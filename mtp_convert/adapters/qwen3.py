"""Qwen3, dense, with MTP as Megatron trains it.

No release has MTP tensors of Qwen3. One depth has the names that Megatron-Bridge reads and writes, which are those of
Qwen3-Next; several depths have names of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number
from mtp_convert.mapping.family import Config, Family, Released
from mtp_convert.mapping.rules import Placed


def dims(config: Config, depths: int) -> q.Dims:
    """Read a config.json."""
    layers = number(config, "num_hidden_layers", MOST)
    return q.dims(config, depths, attention=q.attention(config), sparse=(False,) * layers, mtp_sparse=False)


def places(d: q.Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    assert d.mlp is not None
    return q.places(d, q.Kinds(b.llama_attention(d.attention), b.llama_mlp(d.mlp)))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    return q.megatron_args(config, dims(config, 0), steps, repeated=repeated)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    title="Qwen3 (dense)",
    dims=dims,
    places=places,
    choices=b.choices("wrapper", "decoder", "attention_norm", "mlp_norm", "final_norm"),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=q.megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.GPT_PROVIDER,
    megatron_since=(0, 12),
    released=Released((0,), ("bf16", "fp8")),
    notes=("No release has MTP tensors: one depth is named as in Qwen3-Next.", q.SEVERAL, q.COLUMNS),
)
