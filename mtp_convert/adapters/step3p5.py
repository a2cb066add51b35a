"""Step-3.5-Flash, and the language model of Step-3.7: gated attention with windows, MoE, MTP layers with own heads.

Hugging Face stores MTP depth k as one more decoder layer, N + k, with a norm and an output head of its own below
`transformer.shared_head`: despite the name, the released heads are not the model's. Megatron-Core has one head for all
depths, so they are stored beside its own tensors. All norms count their weight from 0, on both sides.
Names: the released checkpoints, transformers `modeling_step3p7.py`; Megatron-Bridge 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, either, flags, number
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.rules import Block, Param, Placed, Row, Tied, only, rule

WINDOW = {"sliding_attention": True, "full_attention": False}
EXPERTS = {"sparse": True, "dense": False}
FIRST_SPARSE = 3  # where the config does not say which layers have experts


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    sliding, sparse: per decoder layer, whether its attention has a window, and its MLP experts. mtp_sliding: the first
    of the MTP depths; those behind are like the last one. All of them have a dense MLP.
    """

    H: int
    V: int
    sliding: tuple[bool, ...]
    sparse: tuple[bool, ...]
    mtp_sliding: tuple[bool, ...]
    depths: int
    tied: bool
    full: b.Attention
    window: b.Attention
    mlp: b.Mlp
    moe: b.Moe | None


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it."""
    H, layers = number(config, "hidden_size"), number(config, "num_hidden_layers", MOST)
    if biased := [field for field in ("attention_bias", "mlp_bias") if config.get(field)]:
        raise ConfigError(f"{' and '.join(biased)}: no model of this class has biases")
    sliding = flags(config, "layer_types", layers, WINDOW) or (False,) * layers
    sparse = sparse_layers(config, layers)
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        sliding=sliding,
        sparse=sparse,
        mtp_sliding=mtp_layers(config, layers) or (any(sliding),),
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        full=attention(config, {}),
        window=attention(config, window_setting(config)),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=moe(config, H) if any(sparse) else None,
    )


def mtp_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Which MTP layers have a window: the entries behind those of the decoder, or a list of their own."""
    field = "layer_types"
    tail = {field: (config.get(field) or [])[layers:]}
    if not tail[field]:
        field, tail = "mtp_layer_types", {"mtp_layer_types": config.get("mtp_layer_types") or []}
    return flags(tail, field, len(tail[field]), WINDOW) or ()


def sparse_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: a list of words per layer, or of layers, or text with their numbers."""
    if (found := flags(config, "mlp_layer_types", layers, EXPERTS)) is not None:
        return found
    listed = config.get("moe_layers_enum", range(FIRST_SPARSE, layers))
    try:
        numbers = {int(i) for i in (listed.split(",") if isinstance(listed, str) else listed) if str(i).strip()}
    except (TypeError, ValueError):
        raise ConfigError(f"moe_layers_enum must list layers, got {listed!r}") from None
    return tuple(i in numbers for i in range(layers))


def window_setting(config: Config) -> Config:
    """What differs in layers with a window."""
    heads = config.get("num_sliding_attention_heads")
    found = config.get("attention_other_setting") or ({"num_attention_heads": heads} if heads else {})
    if not isinstance(found, dict):
        raise ConfigError(f"attention_other_setting must be an object, got {found!r}")
    return found


def attention(config: Config, other: Config) -> b.Attention:
    """Grouped-query attention with norms and gates, where `other` fields come before those of the config."""
    merged = {**config, **other}
    heads = number(merged, "num_attention_heads")
    names = ("num_attention_groups", "num_key_value_heads")
    groups = either(other if any(n in other for n in names) else config, *names)
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of the {groups} key/value heads")
    return b.Attention(
        number(config, "hidden_size"),
        heads,
        groups,
        number(merged, "head_dim"),
        qk_norm=bool(config.get("use_qk_norm", True)),
        head_gate=bool(config.get("use_head_wise_attn_gate", True)),
    )


def moe(config: Config, H: int) -> b.Moe:
    """Gated experts and a shared one."""
    return b.Moe(
        H,
        E=either(config, "moe_num_experts", "n_routed_experts", most=MOST),
        I=number(config, "moe_intermediate_size"),
        S=either(config, "share_expert_dim", "share_expert_dims"),
        gated=True,
        router_bias=bool(config.get("use_moe_router_bias", True)),
    )


def moe_block(d: b.Moe) -> Block:
    """Experts as released: stacked, gate and up projection apart; transformers holds them as other models do."""
    hf: list[Row] = [rule("post_attention_layernorm.weight", "norm"), rule("moe.gate.weight", "router")]
    if d.router_bias:
        hf.append(rule("moe.router_bias", "router_bias"))
    for p in (*d.first, "down"):
        hf.append(rule(f"moe.{p}_proj.weight", f"experts.{{e}}.{p}", over=("e",)))
        hf.append(rule(f"share_expert.{p}_proj.weight", f"shared.{p}"))
    block = b.llama_moe(d)
    return replace(block, rows={**block.rows, "hf": tuple(hf)})


def head(d: Dims) -> Block:
    """The norm and the output head of an MTP depth; trained by Megatron-Core, the head is the model's."""
    norm = b.mtp_final_norm(d.H, "transformer.shared_head.norm")
    shared = only(Tied("head", "embedding" if d.tied else "head"), heads="shared")
    rows = {
        "hf": (*only(rule("transformer.shared_head.output.weight", "head"), heads="own"), *shared),
        "megatron": (*only(rule("output_layer.weight", "head"), heads="own"), *shared),
        "native": (rule("lm_head.weight", "head"),),
    }
    params = (*norm.params, Param("head", (d.V, d.H), vocab=True, cut=0))
    return Block(params, {layout: (*norm.rows[layout], *more) for layout, more in rows.items()})


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    attentions = {True: b.llama_attention(d.window), False: b.llama_attention(d.full)}
    dense = b.llama_mlp(d.mlp)
    mlps = {False: dense, True: moe_block(d.moe) if d.moe else dense}
    layers = [{"attention": attentions[s], "mlp": mlps[e]} for s, e in zip(d.sliding, d.sparse, strict=True)]
    fusion, final = b.hf_fusion(d.H), head(d)
    depths = [b.Depth(fusion, {"attention": attentions[s], "mlp": dense}, final) for s in d.mtp_sliding]
    ends = b.ends(d.H, d.V, tied=d.tied)
    yield from b.places(ends, layers, depths, depths=d.depths, hf=b.HfPrefixes())


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; heads are those of the full-attention layers."""
    d = dims(config, 0)
    scale = config.get("moe_router_scaling_factor")
    return {
        **args.model_args(config, layers=len(d.sliding), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args({**config, "rope_theta": rope_theta(config)}),
        **args.attention_args(d.full),
        **args.moe_args({**config, "routed_scaling_factor": scale}, d.moe),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "apply_layernorm_1p": True,
        "head_wise_attn_gate": d.full.head_gate,
        "moe_layer_freq": [int(e) for e in d.sparse],
    }


def rope_theta(config: Config) -> float | None:
    """The base of rotary positions of the first layer; releases list it per layer."""
    found = config.get("rope_theta")
    first = next(iter(found), None) if isinstance(found, list) else found
    return None if first is None else float(first)


FAMILY = Family(
    name="step3p5",
    model_types=("step3p5",),
    title="Step-3.5-Flash, Step-3.7 (window attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {"trunk": b.TRUNKS, "heads": ("own", "shared")},
        "megatron": {
            **b.megatron_words(*b.GROUPED_WORDS, inner="transformer_layer"),
            "heads": ("own", "shared"),
        },
        "native": {},
    },
    variants={layout: {"shared-heads": {"heads": "shared"}} for layout in ("hf", "megatron")},
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    released=Released((3,)),
    unproven="Megatron-Core 0.19 has neither gates per head nor layers of different heads",
    notes=(
        "eh_proj columns are [embedding | hidden]; every MTP depth has an output head of its own.",
        "Megatron-Core shares one head: the own ones are stored as mtp.layers.{k}.output_layer.weight, a name of ours "
        "that it ignores; without them, the heads written to Hugging Face are the model's.",
        "Head-wise gates are the last rows of linear_qkv, as on Megatron-Core's development branch; 0.19 can only gate "
        "every channel.",
        "MTP layers are dense: Megatron's model needs a spec that says so, else they are of the last layer's kind.",
        "Megatron-Core has no layers of different heads; the names are those of Megatron-Bridge's model.",
    ),
)
