"""MiMo-V2-Flash, V2.5, V2-Pro: full and sliding-window attention with different heads, MoE, dense MTP layers.

Flash stores q, k and v apart. The later releases fuse them (`attention_projection_layout`) into one run of rows
[q; k; v] per key/value head of the full-attention layers, in all layers, whatever heads a layer has.
Names: the released checkpoints, transformers `modeling_mimo_v2_flash.py`; Megatron-Bridge 0.6, which brings the layer
kinds that Megatron-Core lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, flags, number, optional
from mtp_convert.mapping.family import Config, ConfigError, DepthField, Family, Released
from mtp_convert.mapping.ops import Grouped
from mtp_convert.mapping.rules import Block, Placed, Row, Words, only, rule

WINDOW = {1: True, 0: False, "sliding_attention": True, "full_attention": False}
EXPERTS = {1: True, 0: False, "sparse": True, "dense": False}
HEADS = {"Q": "num_attention_heads", "K": "num_key_value_heads", "D": "head_dim", "V": "v_head_dim"}


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    sliding, sparse: per decoder layer, whether its attention has a window, and its MLP experts. fused: whether the
    release stores q, k and v as one tensor.
    """

    H: int
    V: int
    sliding: tuple[bool, ...]
    sparse: tuple[bool, ...]
    depths: int
    tied: bool
    fused: bool
    full: b.Attention
    window: b.Attention
    mlp: b.Mlp
    moe: b.Moe | None


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it (which knows one kind of heads)."""
    H, layers = number(config, "hidden_size"), number(config, "num_hidden_layers", MOST)
    sliding = per_layer(config, layers, ("hybrid_layer_pattern", "layer_types"), WINDOW)
    sparse = per_layer(config, layers, ("moe_layer_freq", "mlp_layer_types"), EXPERTS)
    layout = config.get("attention_projection_layout")
    if layout not in (None, "fused_qkv"):
        raise ConfigError(f"attention_projection_layout must be 'fused_qkv' or absent, got {layout!r}")
    full = {letter: number(config, field) for letter, field in HEADS.items()}
    usual = {**full, "K": 2 * full["K"]}
    window = {letter: optional(config, f"swa_{field}") or usual[letter] for letter, field in HEADS.items()}
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        sliding=sliding,
        sparse=sparse,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        fused=layout is not None,
        full=attention(config, full, sink=bool(config.get("add_full_attention_sink_bias"))),
        window=attention(config, window, sink=bool(config.get("add_swa_attention_sink_bias", True))),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=moe(config, H) if any(sparse) else None,
    )


def per_layer(config: Config, layers: int, fields: tuple[str, ...], meaning: Mapping[Any, bool]) -> tuple[bool, ...]:
    """What the first of the fields that is there says of every layer."""
    for field in fields:
        if (found := flags(config, field, layers, meaning)) is not None:
            return found
    raise ConfigError(f"neither {' nor '.join(fields)} is given")


def attention(config: Config, sizes: Mapping[str, int], *, sink: bool) -> b.Attention:
    """Attention with these heads."""
    if sizes["Q"] % sizes["K"]:
        raise ConfigError(f"{sizes['Q']} attention heads are no multiple of {sizes['K']} key/value heads")
    return b.Attention(
        number(config, "hidden_size"),
        sizes["Q"],
        sizes["K"],
        sizes["D"],
        V=sizes["V"],
        qkv_bias=bool(config.get("attention_bias")),
        sink=sink,
    )


def moe(config: Config, H: int) -> b.Moe:
    """Gated experts without a shared one."""
    return b.Moe(
        H, E=number(config, "n_routed_experts", MOST), I=number(config, "moe_intermediate_size"), S=0, gated=True
    )


def attention_block(d: Dims, kind: b.Attention) -> Block:
    """Attention as the releases name it; transformers calls the sink `sinks`."""
    block = b.llama_attention(kind)
    apart: list[Row] = []
    own: list[Row] = [rule("input_layernorm.weight", "norm"), rule("self_attn.o_proj.weight", "o")]
    together: list[Row] = []
    for suffix, tensor in (("", "weight"), *((("_bias", "bias"),) if kind.qkv_bias else ())):
        apart += [rule(f"self_attn.{p}_proj.{tensor}", p + suffix) for p in "qkv"]
        together.append(rule(f"self_attn.qkv_proj.{tensor}", *(p + suffix for p in "qkv"), op=Grouped(d.full.K)))
    if kind.sink:
        own.append(rule("self_attn.attention_sink_bias", "sink"))
    hf = (*own, *only(*apart, qkv="split"), *only(*together, qkv="fused"))
    return replace(block, rows={**block.rows, "hf": hf})


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    attentions = {sliding: attention_block(d, d.window if sliding else d.full) for sliding in (True, False)}
    dense = b.llama_mlp(d.mlp)
    mlps = {False: dense, True: b.llama_moe(d.moe) if d.moe else dense}
    layers = [{"attention": attentions[s], "mlp": mlps[e]} for s, e in zip(d.sliding, d.sparse, strict=True)]
    mtp_mlp = replace(dense, rows={**dense.rows, "hf": b.llama_mlp(d.mlp, "pre_mlp_layernorm").rows["hf"]})
    depth = b.Depth(b.hf_fusion(d.H), {"attention": attentions[True], "mlp": mtp_mlp}, b.mtp_final_norm(d.H))
    at = "{trunk}mtp.layers.{k}."
    hf = b.HfPrefixes(fusion=at, inner=at, final=at)
    yield from b.places(b.ends(d.H, d.V, tied=d.tied), layers, depth, depths=d.depths, hf=hf)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; heads are those of the full-attention layers."""
    d = dims(config, 0)
    return {
        **args.model_args(config, layers=len(d.sliding), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.attention_args(d.full),
        **args.moe_args(config, d.moe),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "norm_epsilon": config.get("layernorm_epsilon", config.get("rms_norm_eps", 1e-5)),
        "v_head_dim": d.full.V,
        "moe_layer_freq": [int(e) for e in d.sparse],
    }


def hf_words(d: Dims) -> Words:
    """Whether q, k and v are one tensor."""
    return {"qkv": "fused" if d.fused else "split"}


def depth_count() -> DepthField:
    """Some releases count their MTP depths, others say nothing about them."""
    usual = depth_field("num_nextn_predict_layers")

    def counts(config: Config) -> bool:
        return config.get(usual.name) is not None

    def corrected(config: Config, depths: int) -> dict[str, Any]:
        return usual.corrected(config, depths) if counts(config) else dict(config)

    return replace(usual, corrected=corrected, counts=counts)


FAMILY = Family(
    name="mimo_v2_flash",
    model_types=("mimo_v2_flash", "mimo_v2"),
    title="MiMo-V2-Flash / V2.5 / V2-Pro (window attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.GROUPED_WORDS, qkv=("split", "fused"), experts=b.EXPERTS),
    variants={"hf": {"split-qkv": {"qkv": "split"}, "fused-qkv": {"qkv": "fused"}}},
    depths=depth_count(),
    megatron_args=megatron_args,
    hf_words=hf_words,
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 12),
    released=Released((1, 3), ("fp8",)),
    unproven="Megatron-Core has no layers of different heads",
    notes=(
        "eh_proj columns are [embedding | hidden]; the embedding and the head are the main model's.",
        "MTP layers are dense: Megatron's model needs a spec that says so, else they are of the last layer's kind.",
        "Megatron-Core has no layers of different heads; the names are those of Megatron-Bridge's model.",
        "A fused qkv_proj is read as runs of [q; k; v], one per key/value head of full attention. Modelling code that "
        "splits it into all of q, all of k and all of v stores other numbers under the same name and shape.",
        "Sinks and the router bias keep their stored dtype under --dtype.",
    ),
)
