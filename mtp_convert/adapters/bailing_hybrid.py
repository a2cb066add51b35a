"""Ring-2.5 / Ling-2.5 and Ling-3.0-Flash: linear attention in most layers, latent attention in the others and in MTP.

Linear attention is lightning attention in 2.5, and Kimi delta attention in 3.0, which the config shows by the width of
a short convolution. Latent attention of 3.0 has output gates.
Names: transformers `modeling_bailing_hybrid.py` (3.0); the releases as vLLM and SGLang read them; mcore-bridge 1.6 for
lightning attention in Megatron, Megatron-LM's development branch for Kimi delta attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _bailing as ling
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, either, flags, number
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Block, Param, Placed, Words, only, rule

LINEAR = {"linear_attention": True, "full_attention": False}
GATES = ("head_wise", "element_wise", None)
S = "self_attention"


@dataclass(frozen=True, slots=True)
class Attention:
    """Both kinds of attention; `linear`: per decoder layer, whether it is `recurrent`. gate: rows of the output gate of
    `full`."""

    full: b.Mla
    gate: int
    linear: tuple[bool, ...]
    recurrent: b.Attention | b.Kda


Dims = gpt.Dims[Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it."""
    ling.refuse_biases(config)
    if config.get("full_attention_type", "mla") != "mla":
        raise ConfigError(f"full_attention_type must be 'mla' or absent, got {config['full_attention_type']!r}")
    kimi = bool(config.get("short_conv_kernel_size"))
    sparse = gpt.sparse_layers(config, ling.FIRST_SPARSE)
    full = gpt.mla(config)
    attention = Attention(
        full=full,
        gate=gate_rows(config, full, kimi=kimi),
        linear=linear_layers(config, len(sparse)),
        recurrent=kimi_delta(config) if kimi else lightning(config),
    )
    biased = kimi or bool(config.get("moe_router_enable_expert_bias"))
    moe = ling.experts(config, router_bias=biased, wide_router=kimi)
    return gpt.dims(config, depths, attention=attention, sparse=sparse, moe=moe)


def linear_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Which layers have linear attention: a list says so, or all but the last of every group, and those that are left
    behind the last group."""
    if (found := flags(config, "layer_types", layers, LINEAR)) is not None:
        return found
    group = number(config, "layer_group_size", MOST)
    return tuple((i + 1) % group != 0 and i < layers - layers % group for i in range(layers))


def gate_rows(config: Config, full: b.Mla, *, kimi: bool) -> int:
    """One gate per head, or per channel; 3.0 has the former where its config says nothing."""
    kind = config.get("gated_attention_proj_granularity_type", GATES[0] if kimi else None)
    if kind not in GATES:
        raise ConfigError(f"gated_attention_proj_granularity_type must be one of {GATES}, got {kind!r}")
    return {"head_wise": full.Q, "element_wise": full.Q * full.V}.get(str(kind), 0)


def kimi_delta(config: Config) -> b.Kda:
    """Kimi delta attention, whose gates are projected directly."""
    if config.get("no_kda_lora", True) is not True:
        raise ConfigError(f"no_kda_lora must be true, got {config['no_kda_lora']!r}")
    return b.Kda(
        number(config, "hidden_size"),
        Q=number(config, "num_attention_heads"),
        D=either(config, "linear_head_dim", "head_dim"),
        W=number(config, "short_conv_kernel_size"),
    )


def lightning(config: Config) -> b.Attention:
    """Lightning attention has as many key/value heads as query heads."""
    heads = number(config, "num_attention_heads")
    return b.Attention(
        number(config, "hidden_size"),
        heads,
        heads,
        number(config, "head_dim"),
        qkv_bias=bool(config.get("use_qkv_bias")),
        qk_norm=bool(config.get("use_qk_norm", True)),
    )


def output_gate(rows: int, columns: int) -> Block:
    """The projection that gates the output of attention."""
    return Block(
        (Param("gate", (rows, columns), cut=0),),
        {
            "hf": (rule("attention.g_proj.weight", "gate"),),
            "native": (rule("self_attn.g_proj.weight", "gate"),),
            "megatron": (rule(f"{S}.g_proj.weight", "gate"), *b.te(f"{S}.g_proj")),
        },
    )


def lightning_block(d: b.Attention) -> Block:
    """Lightning attention: its output is normed and gated; Megatron keeps its input norm apart."""
    qkv = b.respelled(ling.fused_attention(d), "megatron", ("{attention_norm}", "input_layernorm.weight"))
    norm = Block(
        (Param("out_norm", (d.Q * d.D,)),),
        {
            "hf": (rule("attention.g_norm.weight", "out_norm"),),
            "native": (rule("self_attn.g_norm.weight", "out_norm"),),
            "megatron": (rule(f"{S}.g_norm.weight", "out_norm"), *b.te("input_layernorm")),
        },
    )
    return b.joined(qkv, output_gate(d.Q * d.D, d.H), norm)


def kimi_block(d: b.Kda) -> Block:
    """Kimi delta attention; transformers saves its output projection under the name that latent attention has."""
    block = b.kimi_kda(d, module="attention")
    rows = [row for row in block.rows["hf"] if getattr(row, "params", ()) != ("o",)]
    for name in ("o_proj", "dense"):
        rows += only(rule(f"attention.{name}.weight", "o"), kda_out=name)
    native = b.kimi_kda(d).rows["native"]
    return Block(block.params, {**block.rows, "hf": tuple(rows), "native": native})


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    a = d.attention
    full = b.respelled(b.deepseek_mla(a.full), "hf", ("self_attn.", "attention."), ("o_proj", "dense"))
    if a.gate:
        full = b.joined(full, output_gate(a.gate, d.H))
    linear = kimi_block(a.recurrent) if isinstance(a.recurrent, b.Kda) else lightning_block(a.recurrent)
    yield from ling.places(d, full, attentions=tuple(linear if x else full for x in a.linear))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; attention is that of the layers with latent attention."""
    d = dims(config, 0)
    found = ling.usual_fields(config)
    return gpt.megatron_args(found, d, steps, repeated=repeated, attention=args.mla_args(found, d.attention.full))


def megatron_words(d: Dims) -> Words:
    """Layers are stored one by one, unless all are alike."""
    return {"decoder": "per_layer"} if any(d.attention.linear) else gpt.megatron_words(d)


FAMILY = Family(
    name="bailing_hybrid",
    model_types=("bailing_hybrid",),
    title="Ring-2.5, Ling-2.5, Ling-3.0-Flash (linear and latent attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.LATENT_WORDS, experts=b.EXPERTS, kda_out=("o_proj", "dense")),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=megatron_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    unproven="Megatron-Core has neither kind of linear attention",
    notes=(
        ling.FUSED,
        gpt.COLUMNS,
        gpt.LATENT,
        "The embedding and the head are the main model's; MTP layers have latent attention.",
        "Megatron-Core has neither kind of linear attention: names of lightning attention are those of mcore-bridge, "
        "names of Kimi delta attention those of Megatron-LM's development branch.",
        "transformers has no lightning attention: its native tree has Llama's names.",
        "The output projection of Kimi delta attention is o_proj; transformers reads that too, and writes dense.",
        "Router bias, convolutions, A_log and dt_bias keep their stored dtype under --dtype; in 3.0 the router, too.",
    ),
)
