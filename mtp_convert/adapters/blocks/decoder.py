"""A decoder-only model put together: ends, layers of blocks, MTP depths, with the prefixes of every layout.

Layers are mappings from a role ("attention", "mlp") to a block, so that params have names like `layers.3.mlp.down`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import megatron_words, te
from mtp_convert.mapping.family import Choices
from mtp_convert.mapping.rules import Block, Copy, Extra, Param, Placed, Row, only, rule

Layer = Mapping[str, Block]


@dataclass(frozen=True, slots=True)
class Depth:
    """One MTP depth: what opens it, its decoder layer, and what closes it."""

    fusion: Block
    layer: Layer
    final: Block


@dataclass(frozen=True, slots=True)
class HfPrefixes:
    """Where a Hugging Face layout puts the parts. `{n}` is the index behind the last layer: layers + depth."""

    layer: str = "{trunk}layers.{i}."
    fusion: str = "{trunk}layers.{n}."
    inner: str = "{trunk}layers.{n}."
    final: str = "{trunk}layers.{n}."


TRUNKS = ("model.", "model.language_model.", "language_model.model.", "")
EXPERTS = ("split", "stacked")
# Megatron's words of decoders with experts, by their attention.
GROUPED_WORDS = ("wrapper", "decoder", "attention_norm", "mlp_norm", "moe_norm", "final_norm")
LATENT_WORDS = ("wrapper", "decoder", "mlp_norm", "moe_norm", "q_norm", "kv_norm", "final_norm")
NATIVE = HfPrefixes("model.layers.{i}.", "mtp.layers.{k}.", "mtp.layers.{k}.", "mtp.layers.{k}.")
MEGATRON = HfPrefixes(
    "{wrapper}decoder.layers.{i}.",
    "{wrapper}mtp.layers.{k}.",
    "{wrapper}mtp.layers.{k}.{inner}.",
    "{wrapper}mtp.layers.{k}.",
)


def choices(*megatron: str, **hf: tuple[str, ...]) -> dict[str, Choices]:
    """The choices of a decoder: Megatron's words by name, and the Hugging Face words beside the trunk with spellings.

    The native tree is transformers' own, so it has none.
    """
    return {
        "hf": {"trunk": TRUNKS, **hf},
        "megatron": megatron_words(*megatron, inner="transformer_layer"),
        "native": {},
    }


def places(
    ends: Block, layers: Sequence[Layer], depth: Depth | Sequence[Depth] | None, *, depths: int, hf: HfPrefixes
) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout.

    Args:
        depth: what every MTP depth is, or what the first ones are; those behind are like the last of them.
    """
    kinds = [depth] if isinstance(depth, Depth) else list(depth or ())

    def prefixes(part: str) -> dict[str, str]:
        every = {"hf": hf, "native": NATIVE, "megatron": MEGATRON}
        return {layout: str(getattr(found, part)) for layout, found in every.items()}

    yield Placed(ends, "", {"hf": "", "native": "", "megatron": "{wrapper}"})
    for i, layer in enumerate(layers):
        for role, block in layer.items():
            yield Placed(block, f"layers.{{i}}.{role}.", prefixes("layer"), {"i": i}, stack="i")
    for k in range(depths if kinds else 0):
        kind = kinds[min(k, len(kinds) - 1)]
        at = {"k": k, "n": len(layers) + k}
        yield Placed(kind.fusion, "mtp.{k}.", prefixes("fusion"), at)
        for role, block in kind.layer.items():
            yield Placed(block, f"mtp.{{k}}.{role}.", prefixes("inner"), at)
        yield Placed(kind.final, "mtp.{k}.", prefixes("final"), at)


def ends(
    H: int,
    V: int,
    *,
    tied: bool,
    embedding: str = "{trunk}embed_tokens.weight",
    norm: str = "{trunk}norm.weight",
    head: str = "lm_head.weight",
) -> Block:
    """Embedding [V, H], final norm [H] and output head [V, H]; the names are the Hugging Face ones."""
    params = [Param("embedding", (V, H), vocab=True, cut=0), Param("final_norm", (H,))]
    names = {
        "hf": (embedding, norm, head),
        "native": ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        "megatron": (
            "embedding.word_embeddings.weight",
            "decoder.{final_norm}.weight",
            "output_layer.weight",
        ),
    }
    rows: dict[str, tuple[Row, ...]] = {}
    for layout, (first, last, output) in names.items():
        own = Copy(output, "embedding") if tied else rule(output, "head")
        rows[layout] = (rule(first, "embedding"), rule(last, "final_norm"), own)
    rows["megatron"] += te("decoder.{final_norm}")
    rows["megatron"] += only(Extra("output_layer._extra_state", none=True), keys="state_dict")
    if not tied:
        params.append(Param("head", (V, H), vocab=True, cut=0))
    return Block(tuple(params), rows)


def homogeneous(layers: Sequence[Layer]) -> bool:
    """Whether all layers are alike, so that Megatron-Core stores them stacked."""
    return all(layer == layers[0] for layer in layers)
