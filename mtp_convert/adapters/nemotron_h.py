"""Nemotron-H (Nemotron 3 Nano / Super / Ultra, 3.5 Lightning, v2): hybrid Mamba2 / attention / MLP / MoE with MTP.

Hugging Face stores MTP sub-layers under one flat index: f = depth * P + j with P = len(MTP pattern); enorm, hnorm and
eh_proj sit on the first sub-layer of a depth, final_layernorm on the last. Megatron nests them per depth.
Names: transformers `modeling_nemotron_h.py` and the released checkpoints; Megatron-Core 0.19 `HybridModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.ops import Permute
from mtp_convert.mapping.rules import Block, Copy, Extra, Param, Placed, Row, Rule, only, rule

# One letter per block kind, as in `hybrid_override_pattern`; lists spell them out (transformers 4 and 5 differ).
LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
MTP_PATTERN = ("mtp_hybrid_override_pattern", "mtp_layers_block_type")


@dataclass(frozen=True, slots=True)
class NemotronDims:
    """Everything that fixes the names and shapes of a Nemotron-H."""

    H: int
    V: int
    pattern: str
    mtp_pattern: str
    depths: int
    tied: bool
    attention: b.Attention
    mlp: b.Mlp
    mamba: b.Mamba | None
    moe: b.Moe | None


def dims(config: Config, depths: int) -> NemotronDims:
    """Read a config.json; fields that no block of the pattern needs may be absent."""
    H = number(config, "hidden_size")
    pattern = read_pattern(config, "hybrid_override_pattern", "layers_block_type")
    mtp = read_pattern(config, *MTP_PATTERN) if depths or any(config.get(f) for f in MTP_PATTERN) else ""
    declared = config.get("num_hidden_layers")
    if declared is not None and declared != len(pattern):
        raise ConfigError(f"num_hidden_layers is {declared}, the pattern {pattern!r} has {len(pattern)}")
    used = set(pattern + mtp)
    if config.get("mlp_bias") and "E" in (pattern + mtp if depths else pattern):
        raise ConfigError("mlp_bias gives shared experts a bias, which Megatron's shared experts cannot have")
    heads, groups = number(config, "num_attention_heads"), number(config, "num_key_value_heads")
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    head_dim = next((number(config, f) for f in ("head_dim", "attention_head_dim") if config.get(f)), H // heads)
    return NemotronDims(
        H=H,
        V=number(config, "vocab_size"),
        pattern=pattern,
        mtp_pattern=mtp,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=b.Attention(
            H,
            heads,
            groups,
            head_dim,
            qkv_bias=bool(config.get("attention_bias")),
            o_bias=bool(config.get("attention_bias")),
        ),
        mlp=b.Mlp(
            H,
            number(config, "intermediate_size") if "-" in used else 0,
            bool(config.get("mlp_bias")),
        ),
        mamba=_mamba(config, H) if "M" in used else None,
        moe=_moe(config, H) if "E" in used else None,
    )


def _mamba(config: Config, H: int) -> b.Mamba:
    if config.get("use_bias") or config.get("mamba_proj_bias") or not config.get("use_conv_bias", True):
        raise ConfigError(
            "Megatron's Mamba mixer has no projection bias and always a conv bias; use_bias must be "
            "false and use_conv_bias true"
        )
    return b.Mamba(
        H,
        N=number(config, "mamba_num_heads"),
        head=number(config, "mamba_head_dim"),
        G=number(config, "n_groups") * number(config, "ssm_state_size"),
        W=number(config, "conv_kernel"),
    )


def _moe(config: Config, H: int) -> b.Moe:
    return b.Moe(
        H,
        E=number(config, "n_routed_experts", MOST),
        I=number(config, "moe_intermediate_size"),
        S=number(config, "moe_shared_expert_intermediate_size"),
        latent=number(config, "moe_latent_size") if config.get("moe_latent_size") else None,
    )


def read_pattern(config: Config, text: str, listed: str) -> str:
    """A block pattern as letters, from the string field, from the list field, or from both if they agree."""
    found: dict[str, str] = {}
    if config.get(text) is not None:
        found[text] = str(config[text]).replace("|", "")
    if config.get(listed) is not None:
        if not isinstance(config[listed], list):
            raise ConfigError(f"{listed} must be a list, got {config[listed]!r}")
        unknown = sorted({str(x) for x in config[listed]} - LETTERS.keys())
        if unknown:
            raise ConfigError(f"{listed} names unknown block kinds: {', '.join(unknown)}")
        found[listed] = "".join(LETTERS[x] for x in config[listed])
    if not found:
        raise ConfigError(f"neither {text} nor {listed} is given")
    if len(set(found.values())) > 1:
        raise ConfigError(" and ".join(f"{k} = {v!r}" for k, v in found.items()) + " disagree")
    pattern = next(iter(found.values()))
    if bad := set(pattern) - set("M*-E") or (not pattern and {"nothing"}):
        raise ConfigError(f"{next(iter(found))}: unknown block kinds {sorted(bad)}")
    return pattern


def attention(d: NemotronDims) -> Block:
    """`*`"""
    rows = [rule(f"mixer.{p}_proj.weight", p) for p in "qkvo"]
    bias = [rule(f"mixer.{p}_proj.bias", f"{p}_bias") for p in "qkvo"] if d.attention.qkv_bias else []
    return b.with_hf(b.attention(d.attention), rule("norm.weight", "norm"), *rows, *bias)


def mlp(d: NemotronDims) -> Block:
    """`-`"""
    rows = [rule(f"mixer.{p}_proj.weight", p) for p in ("up", "down")]
    bias = [rule(f"mixer.{p}_proj.bias", f"{p}_bias") for p in ("up", "down")] if d.mlp.bias else []
    return b.with_hf(b.mlp(d.mlp), rule("norm.weight", "norm"), *rows, *bias)


def moe(d: NemotronDims) -> Block:
    """`E`"""
    assert d.moe is not None
    bias = "mixer.gate.e_score_correction_bias"
    rows: list[Row] = [rule("norm.weight", "norm"), rule("mixer.gate.weight", "router")]
    if d.moe.S:
        rows += [rule(f"mixer.shared_experts.{p}_proj.weight", f"shared.{p}") for p in ("up", "down")]
    if d.moe.latent:
        rows += [
            rule("mixer.fc1_latent_proj.weight", "latent_in"),
            rule("mixer.fc2_latent_proj.weight", "latent_out"),
        ]
    single = [rule(f"mixer.experts.{{e}}.{p}_proj.weight", f"experts.{{e}}.{p}") for p in ("up", "down")]
    stacked = [rule(f"mixer.experts.{p}_proj", f"experts.{{e}}.{p}", over=("e",)) for p in ("up", "down")]
    transposed = [
        rule(f"mixer.experts.{name}_projs", f"experts.{{e}}.{p}", op=Permute((1, 0)), over=("e",))
        for name, p in (("gate_and_up", "up"), ("down", "down"))
    ]
    native = (
        *rows,
        *only(rule(bias, "router_bias"), *stacked, experts="stacked"),
        *only(rule(bias, "router_bias", dtype="F32"), *transposed, experts="transposed"),
    )
    return b.with_hf(b.moe(d.moe), *rows, rule(bias, "router_bias"), *single, native=native)


def mamba(d: NemotronDims) -> Block:
    """`M`"""
    assert d.mamba is not None
    norm, holder = rule("norm.weight", "norm"), "_fp32_params."
    native = (
        norm,
        *only(*b.hf_mamba_rows("mixer"), ssm=""),
        *only(*b.hf_mamba_rows("mixer", holder, "F32"), ssm=holder),
    )
    return b.with_hf(b.mamba(d.mamba), norm, *b.hf_mamba_rows("mixer"), native=native)


KINDS = {"M": mamba, "*": attention, "-": mlp, "E": moe}


def ends(d: NemotronDims) -> Block:
    """Embedding, final norm and output head."""
    embed = "{trunk}.{embeddings}.weight"
    params = [Param("embedding", (d.V, d.H), vocab=True, cut=0), Param("final_norm", (d.H,))]
    hf: list[Row] = [rule(embed, "embedding"), rule("{trunk}.{norm}.weight", "final_norm")]
    megatron: list[Row] = [
        rule("embedding.word_embeddings.weight", "embedding"),
        rule("decoder.{final_norm}.weight", "final_norm"),
        Extra("decoder.{final_norm}._extra_state"),
        Extra("output_layer._extra_state", none=True),
    ]
    if d.tied:
        hf.append(Copy("lm_head.weight", "embedding"))
        megatron.append(Copy("output_layer.weight", "embedding"))
    else:
        params.append(Param("head", (d.V, d.H), vocab=True, cut=0))
        hf.append(rule("lm_head.weight", "head"))
        megatron.append(rule("output_layer.weight", "head"))
    native = tuple(
        replace(row, tensor=row.tensor.replace("{trunk}", "model")) for row in hf if isinstance(row, Rule | Copy)
    )
    return Block(tuple(params), {"hf": tuple(hf), "megatron": tuple(megatron), "native": native})


def places(d: NemotronDims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield Placed(ends(d), "", {"hf": "{wrapper}", "megatron": "{wrapper}", "native": ""})
    blocks = {letter: KINDS[letter](d) for letter in set(d.pattern + d.mtp_pattern)}
    layer = {
        "hf": "{wrapper}{trunk}.layers.{i}.",
        "megatron": "{wrapper}decoder.layers.{i}.",
        "native": "model.layers.{i}.",
    }
    for i, letter in enumerate(d.pattern):
        yield Placed(blocks[letter], "layers.{i}.", layer, {"i": i}, stack="i")
    fusion, final = b.hf_fusion(d.H), b.mtp_final_norm(d.H)
    flat = {"hf": "{wrapper}mtp.layers.{f}.", "native": "mtp.layers.{f}."}
    depth = {**flat, "megatron": "{wrapper}mtp.layers.{k}."}
    sub = {**flat, "megatron": "{wrapper}mtp.layers.{k}.{inner}.layers.{j}."}
    P = len(d.mtp_pattern)
    for k in range(d.depths):
        yield Placed(fusion, "mtp.{k}.", depth, {"k": k, "f": k * P})
        for j, letter in enumerate(d.mtp_pattern):
            yield Placed(blocks[letter], "mtp.{k}.layers.{j}.", sub, {"k": k, "j": j, "f": k * P + j})
        yield Placed(final, "mtp.{k}.", depth, {"k": k, "f": k * P + P - 1})


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 1 if steps else 0)
    return {
        **args.model_args(config, layers=len(d.pattern), H=d.H, V=d.V, tied=d.tied),
        **args.attention_args(d.attention),
        **args.mamba_args(config, d.mamba),
        **args.moe_args(config, d.moe),
        **args.mtp_args(steps, d.mtp_pattern, repeated=repeated),
        "position_embedding_type": "none",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": False,
        "add_bias_linear": d.attention.o_bias or d.mlp.bias,
        "squared_relu": config.get("mlp_hidden_act", "relu2") == "relu2",
        "swiglu": False,
        "is_hybrid_model": True,
        "hybrid_layer_pattern": "/".join([d.pattern, *[d.mtp_pattern] * steps]),
        "hybrid_override_pattern": d.pattern,
        "spec": ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    }


FAMILY = Family(
    name="nemotron_h",
    model_types=("nemotron_h",),
    title="Nemotron-H / Nemotron 3 (hybrid Mamba2, attention, MLP, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {
            "wrapper": ("", "language_model.", "llm."),
            "trunk": ("backbone", "model"),
            "embeddings": ("embeddings", "embedding", "embed_tokens"),
            "norm": ("norm_f", "norm"),
        },
        "megatron": b.megatron_words(
            "wrapper",
            "inner",
            "decoder",
            "attention_norm",
            "mlp_norm",
            "moe_norm",
            "mamba_norm",
            final_norm="final_norm",
        ),
        # transformers calls the ends of its tree otherwise than NeMo AutoModel and this package do
        "native": {
            "embeddings": ("embed_tokens", "embeddings"),
            "norm": ("norm", "norm_f"),
            "experts": ("stacked", "transposed"),
            "ssm": ("", "_fp32_params."),
        },
    },
    variants={
        "native": {
            "automodel": {"experts": "transposed", "ssm": "_fp32_params."},
            "automodel-0.5": {"experts": "transposed", "ssm": ""},
        },
    },
    depths=depth_field("num_nextn_predict_layers", *MTP_PATTERN),
    megatron_args=megatron_args,
    forms=b.MEGATRON_FORMS,
    bridge_provider="megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider",
    megatron_since=(0, 17),
    released=Released((0, 1), ("bf16", "fp8", "nvfp4")),
    notes=(
        "Attention has no position encoding; eh_proj columns are [embedding | hidden].",
        "A released checkpoint stores one MTP depth and trains it as a repeated layer: the config says 1.",
        "Router bias, A_log, D and dt_bias keep their stored dtype under --dtype.",
    ),
)
