"""What Ling and Ring models have in common: fused queries, keys and values, and their names of other things.

Rows of `query_key_value` are [all queries; all keys; all values].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.mapping.family import Config, ConfigError
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Placed, Row, rule

FIRST_SPARSE = 1  # where the config does not say which layers have experts
FUSED = "Rows of query_key_value are [all queries; all keys; all values]."


def experts(config: Config, *, router_bias: bool, wide_router: bool = False) -> b.Moe:
    """Gated experts; a shared one may have a width of its own."""
    found = gpt.experts(config, "num_experts", "num_shared_experts", "moe_shared_expert_intermediate_size")
    return replace(found, router_bias=router_bias, wide_router=wide_router)


def usual_fields(config: Config) -> dict[str, Any]:
    """The config with the fields of routing as other models name them; transformers has names of its own."""
    renamed = {"num_experts_per_tok": "num_experts_per_token", "n_group": "num_expert_group"}
    return {**config, **{usual: config[own] for usual, own in renamed.items() if own in config}}


def fused_attention(d: b.Attention) -> Block:
    """Attention with fused queries, keys and values; the native tree has them apart, as Llama does."""
    block = b.llama_attention(d)
    own: list[Row] = [
        rule("input_layernorm.weight", "norm"),
        rule("attention.query_key_value.weight", *"qkv", op=Concat(0)),
        rule("attention.dense.weight", "o"),
    ]
    if d.qkv_bias:
        own.append(rule("attention.query_key_value.bias", *(f"{p}_bias" for p in "qkv"), op=Concat(0)))
    if d.qk_norm:
        own += [rule(f"attention.{name}_layernorm.weight", f"{name[0]}_norm") for name in ("query", "key")]
    return replace(block, rows={**block.rows, "hf": tuple(own)})


def refuse_biases(config: Config) -> None:
    """Biases of single linear layers.

    Raises:
        ConfigError: the config asks for them.
    """
    if config.get("use_bias"):
        raise ConfigError("use_bias: Megatron has no bias of the output projection alone")


def places(d: gpt.Dims[Any], attention: Block, *, attentions: tuple[Block, ...] = ()) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout; arguments as in `_gpt.places`."""
    ends = b.ends(d.H, d.V, tied=d.tied, embedding="{trunk}word_embeddings.weight")
    bias = ("gate.e_score_correction_bias", "gate.expert_bias")
    moe = b.respelled(b.llama_moe(d.moe), "hf", bias) if d.moe else None
    yield from gpt.places(d, attention, moe, attentions=attentions, final="final_layernorm", copies=False, ends=ends)
