"""MiMo-7B: a Qwen2 decoder (biases of queries, keys and values) with MTP layers; Qwen2 itself has the same names.

The release projects [hidden | embedding]; Megatron and the module tree have the halves the other way round.
Names: the released checkpoint, transformers `modeling_qwen2.py`; Megatron-Core 0.19 `GPTModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number, optional
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Placed, Words


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes; all layers are alike."""

    V: int
    layers: int
    depths: int
    tied: bool
    attention: b.Attention
    mlp: b.Mlp


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    H = number(config, "hidden_size")
    heads, groups = number(config, "num_attention_heads"), number(config, "num_key_value_heads")
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if not config.get("attention_bias", True):
        raise ConfigError("attention_bias: queries, keys and values have biases in every model of this class")
    return Dims(
        V=number(config, "vocab_size"),
        layers=number(config, "num_hidden_layers", MOST),
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=b.Attention(H, heads, groups, optional(config, "head_dim") or H // heads, qkv_bias=True),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
    )


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    H = d.attention.H
    layer = {"attention": b.llama_attention(d.attention), "mlp": b.llama_mlp(d.mlp)}
    fusion = b.hf_fusion(H, "token_layernorm", "hidden_layernorm", "input_proj", hidden_first=True)
    depth = b.Depth(fusion, layer, b.mtp_final_norm(H))
    at = "{trunk}mtp_layers.{k}."
    hf = b.HfPrefixes(fusion=at, inner=at, final=at)
    yield from b.places(b.ends(H, d.V, tied=d.tied), [layer] * d.layers, depth, depths=d.depths, hf=hf)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return {
        **args.model_args(config, layers=d.layers, H=d.attention.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.attention_args(d.attention),
        **args.gpt_mtp_args(steps, repeated=repeated),
    }


def megatron_words(_: Dims) -> Words:
    """Equal layers are stored stacked."""
    return {"decoder": "stacked"}


FAMILY = Family(
    name="mimo",
    model_types=("mimo", "qwen2"),
    title="MiMo-7B, Qwen2 (dense)",
    dims=dims,
    places=places,
    choices=b.choices("wrapper", "decoder", "attention_norm", "mlp_norm", "final_norm"),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=megatron_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    notes=(
        "input_proj columns are [hidden | embedding] in the release, [embedding | hidden] in Megatron: halves swap.",
        "The embedding and the head are the main model's.",
    ),
)
