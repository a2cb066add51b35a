"""ERNIE-4.5 MoE: dense layers first, mixtures of experts, MTP layers whose parts lie in lists of their own.

The release stores no norm behind an MTP layer: the output goes through the model's final norm. Megatron-Core has one
per depth, which holds the same numbers here.
Names: the released checkpoint, transformers `modeling_ernie4_5_moe.py`; Megatron-Core 0.19 `GPTModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, either, number, optional
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Block, Placed, Tied, rule


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes; `sparse`: per decoder layer, whether it has experts."""

    H: int
    V: int
    sparse: tuple[bool, ...]
    depths: int
    tied: bool
    attention: b.Attention
    mlp: b.Mlp
    moe: b.Moe | None


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    H, sparse = number(config, "hidden_size"), sparse_layers(config)
    heads, groups = number(config, "num_attention_heads"), number(config, "num_key_value_heads")
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if config.get("use_bias"):
        raise ConfigError("use_bias: Megatron's output layer and experts have no bias")
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        sparse=sparse,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", True)),
        attention=b.Attention(H, heads, groups, optional(config, "head_dim") or H // heads),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=moe(config, H) if any(sparse) else None,
    )


def sparse_layers(config: Config) -> tuple[bool, ...]:
    """Every `moe_layer_interval`-th layer from a first to a last one has experts."""
    layers, step = number(config, "num_hidden_layers", MOST), optional(config, "moe_layer_interval", MOST) or 1
    end = config.get("moe_layer_end_index")
    last = layers - 1 if end in (None, -1) else optional(config, "moe_layer_end_index", MOST)
    first = optional(config, "moe_layer_start_index", MOST)
    return tuple((i + 1) % step == 0 and first <= i <= last for i in range(layers))


def moe(config: Config, H: int) -> b.Moe:
    """Gated experts; shared experts are one wide expert."""
    inner = number(config, "moe_intermediate_size")
    shared = inner * optional(config, "moe_num_shared_experts", MOST)
    return b.Moe(H, E=either(config, "moe_num_experts", "num_experts", most=MOST), I=inner, S=shared, gated=True)


def moe_block(d: b.Moe) -> Block:
    """Experts with the names of DeepSeek; the router bias [E] is stored as one pool of several, [1, E]."""
    block = b.llama_moe(d)
    rows = dict(block.rows)
    for layout, name in (("hf", "mlp.moe_statics"), ("native", "mlp.gate.moe_statics")):
        bias = rule(f"{name}.e_score_correction_bias", "router_bias", over=("pool",))
        rows[layout] = tuple(bias if getattr(row, "params", ()) == ("router_bias",) else row for row in rows[layout])
    return Block(block.params, rows, {**block.domains, "pool": range(1)})


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    dense: b.Layer = {"attention": b.llama_attention(d.attention), "mlp": b.llama_mlp(d.mlp)}
    experts = {**dense, "mlp": moe_block(d.moe)} if d.moe else dense
    fusion = b.hf_fusion(d.H, "mtp_emb_norm.{k}", "mtp_hidden_norm.{k}", "mtp_linear_proj.{k}")
    norm = b.mtp_final_norm(d.H)
    final = replace(norm, rows={**norm.rows, "hf": (Tied("final_layernorm", "final_norm"),)})
    hf = b.HfPrefixes(fusion="{trunk}", inner="{trunk}mtp_block.{k}.", final="{trunk}")
    layers = [experts if sparse else dense for sparse in d.sparse]
    depth = b.Depth(fusion, dense, final)
    yield from b.places(b.ends(d.H, d.V, tied=d.tied), layers, depth, depths=d.depths, hf=hf)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return {
        **args.model_args(config, layers=len(d.sparse), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.attention_args(d.attention),
        **args.moe_args({**config, "num_experts_per_tok": experts_per_token(config)}, d.moe, score="softmax"),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "rotary_interleaved": True,
        "moe_layer_freq": [int(e) for e in d.sparse],
    }


def experts_per_token(config: Config) -> int:
    """How many experts a token goes to."""
    return either(config, "moe_k", "num_experts_per_tok", most=MOST)


FAMILY = Family(
    name="ernie4_5_moe",
    model_types=("ernie4_5_moe",),
    title="ERNIE-4.5 MoE (text)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    unproven="Megatron-Core 0.19 refuses a router bias beside softmax scores",
    notes=(
        "mtp_linear_proj columns are [embedding | hidden].",
        "MTP layers are dense: Megatron's model needs a spec that says so, else they are of the last layer's kind.",
        "Megatron's mtp.layers.{k}.final_layernorm is a copy of model.norm; once trained apart from it, Hugging Face's "
        "layout has no place for it, and the conversion is refused.",
        "rotary_interleaved: neighbouring dimensions of a head turn together, as in the release.",
        "The router is a softmax with a bias for the choice. Megatron-Core 0.19 has biases for sigmoid scores only and "
        "refuses these arguments; with a sigmoid it computes another model.",
        "The router bias keeps its stored dtype under --dtype.",
    ),
)
