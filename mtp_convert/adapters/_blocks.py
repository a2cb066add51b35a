"""Blocks shared by families: params with shapes, and their rows in Megatron-Core's torch_dist names.

A family adds its own Hugging Face rows with `with_hf`. Shape legend:
    H hidden   V vocab   Q query heads   K key/value heads   D head dim   F dense mlp   E experts   I expert mlp
    L expert input (H, or the latent size)   S shared-expert mlp   C mamba inner = heads x head dim   N mamba heads
    G mamba groups x state   W conv width

Words of the Megatron layout: where a pre-norm lives (fused into the next linear by TransformerEngine, or separate).
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.mapping.ops import Concat, Grouped
from mtp_convert.mapping.rules import Block, Extra, Param, Row, rule

# The first spelling is what current Megatron-Core with TransformerEngine specs writes.
MEGATRON_CHOICES: dict[str, tuple[str, ...]] = {
    "inner": ("mtp_model_layer", "transformer_layer"),
    "decoder": ("per_layer", "stacked"),
    "attention_norm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "moe_norm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "mamba_norm": ("mixer.in_proj.layer_norm_weight", "norm.weight"),
}


@dataclass(frozen=True, slots=True)
class Attention:
    """Sizes of a grouped-query attention block."""

    H: int
    Q: int
    K: int
    D: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Mlp:
    """Sizes of an ungated MLP block."""

    H: int
    F: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Moe:
    """Sizes of an ungated mixture of experts; `latent` is None when experts work on the hidden size."""

    H: int
    E: int
    I: int  # noqa: E741 - the field's letter for the expert width
    S: int
    latent: int | None = None


@dataclass(frozen=True, slots=True)
class Mamba:
    """Sizes of a Mamba2 mixer."""

    H: int
    N: int
    head: int
    G: int
    W: int


def with_hf(block: Block, *rows: Row, native: tuple[Row, ...] | None = None) -> Block:
    """The block with its Hugging Face rows; those of the native tree where they differ."""
    return Block(block.params, {**block.rows, "hf": rows, "native": rows if native is None else native}, block.domains)


def te(*modules: str, over: tuple[str, ...] = ()) -> tuple[Extra, ...]:
    """The `_extra_state` objects of TransformerEngine modules."""
    return tuple(Extra(f"{m}._extra_state", over) for m in modules)


def attention(d: Attention) -> Block:
    """Pre-norm grouped-query attention; Megatron interleaves q, k, v per KV group."""
    params = [
        Param("norm", (d.H,)),
        Param("q", (d.Q * d.D, d.H)),
        Param("k", (d.K * d.D, d.H)),
        Param("v", (d.K * d.D, d.H)),
        Param("o", (d.H, d.Q * d.D)),
    ]
    rows: list[Row] = [
        rule("{attention_norm}", "norm"),
        rule("self_attention.linear_qkv.weight", "q", "k", "v", op=Grouped(d.K)),
        rule("self_attention.linear_proj.weight", "o"),
        *te("self_attention.linear_qkv", "self_attention.linear_proj"),
    ]
    if d.bias:
        params += [
            Param("q_bias", (d.Q * d.D,)),
            Param("k_bias", (d.K * d.D,)),
            Param("v_bias", (d.K * d.D,)),
            Param("o_bias", (d.H,)),
        ]
        rows += [
            rule("self_attention.linear_qkv.bias", "q_bias", "k_bias", "v_bias", op=Grouped(d.K)),
            rule("self_attention.linear_proj.bias", "o_bias"),
        ]
    return Block(tuple(params), {"megatron": tuple(rows)})


def mlp(d: Mlp) -> Block:
    """Pre-norm MLP without a gate."""
    params = [Param("norm", (d.H,)), Param("up", (d.F, d.H)), Param("down", (d.H, d.F))]
    rows: list[Row] = [
        rule("{mlp_norm}", "norm"),
        rule("mlp.linear_fc1.weight", "up"),
        rule("mlp.linear_fc2.weight", "down"),
        *te("mlp.linear_fc1", "mlp.linear_fc2"),
    ]
    if d.bias:
        params += [Param("up_bias", (d.F,)), Param("down_bias", (d.H,))]
        rows += [rule("mlp.linear_fc1.bias", "up_bias"), rule("mlp.linear_fc2.bias", "down_bias")]
    return Block(tuple(params), {"megatron": tuple(rows)})


def moe(d: Moe) -> Block:
    """Pre-norm mixture of ungated experts with a sigmoid router, a shared expert and optional latent projections."""
    L = d.latent or d.H
    params = [
        Param("norm", (d.H,)),
        Param("router", (d.E, d.H)),
        Param("router_bias", (d.E,), high_precision=True),
        Param("experts.{e}.up", (d.I, L)),
        Param("experts.{e}.down", (L, d.I)),
    ]
    fc1, fc2 = "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"
    rows: list[Row] = [
        rule("{moe_norm}", "norm"),
        rule("mlp.router.weight", "router"),
        rule("mlp.router.expert_bias", "router_bias"),
        rule(f"{fc1}.weight", "experts.{e}.up", over=("e",)),
        rule(f"{fc2}.weight", "experts.{e}.down", over=("e",)),
        *te("pre_mlp_layernorm"),
        *te(fc1, fc2, over=("e",)),
    ]
    if d.S:
        params += [Param("shared.up", (d.S, d.H)), Param("shared.down", (d.H, d.S))]
        shared = "mlp.shared_experts.linear_fc"
        rows += [
            rule(f"{shared}1.weight", "shared.up"),
            rule(f"{shared}2.weight", "shared.down"),
            *te(f"{shared}1", f"{shared}2"),
        ]
    if d.latent:
        params += [Param("latent_in", (d.latent, d.H)), Param("latent_out", (d.H, d.latent))]
        rows += [
            rule("mlp.fc1_latent_proj.weight", "latent_in"),
            rule("mlp.fc2_latent_proj.weight", "latent_out"),
            *te("mlp.fc1_latent_proj", "mlp.fc2_latent_proj"),
        ]
    return Block(tuple(params), {"megatron": tuple(rows)}, {"e": range(d.E)})


def mamba(d: Mamba) -> Block:
    """Pre-norm Mamba2 mixer; torch_dist keeps the parts of the fused projections apart because TP cuts each of them."""
    C = d.N * d.head
    conv = {"x": C, "B": d.G, "C": d.G}
    proj = {"z": C, **conv, "dt": d.N}
    params = (
        Param("norm", (d.H,)),
        *(Param(f"in_proj.{p}", (n, d.H)) for p, n in proj.items()),
        *(Param(f"conv.{p}", (n, 1, d.W)) for p, n in conv.items()),
        *(Param(f"conv_bias.{p}", (n,)) for p, n in conv.items()),
        Param("A_log", (d.N,), high_precision=True),
        Param("D", (d.N,), high_precision=True),
        Param("dt_bias", (d.N,), high_precision=True),
        Param("gate_norm", (C,)),
        Param("out", (d.H, C)),
    )
    rows: tuple[Row, ...] = (
        rule("{mamba_norm}", "norm"),
        *(rule(f"mixer.in_proj.weight.{p}", f"in_proj.{p}") for p in proj),
        *(rule(f"mixer.conv1d.weight.{p}", f"conv.{p}") for p in conv),
        *(rule(f"mixer.conv1d.bias.{p}", f"conv_bias.{p}") for p in conv),
        rule("mixer.A_log", "A_log"),
        rule("mixer.D", "D"),
        rule("mixer.dt_bias", "dt_bias"),
        rule("mixer.norm.weight", "gate_norm"),
        rule("mixer.out_proj.weight", "out"),
        *te("mixer.in_proj", "mixer.out_proj"),
    )
    return Block(params, {"megatron": rows})


def hf_mamba_rows(mixer: str, ssm: str = "", dtype: str = "") -> tuple[Row, ...]:
    """The fused Mamba2 rows of every Hugging Face model, below the module name `mixer`; `ssm` is the holder of the
    state-space params, which it may keep in a `dtype` of its own."""
    parts = ("x", "B", "C")
    return (
        rule(f"{mixer}.in_proj.weight", *(f"in_proj.{p}" for p in ("z", *parts, "dt")), op=Concat(0)),
        rule(f"{mixer}.conv1d.weight", *(f"conv.{p}" for p in parts), op=Concat(0)),
        rule(f"{mixer}.conv1d.bias", *(f"conv_bias.{p}" for p in parts), op=Concat(0)),
        *(rule(f"{mixer}.{ssm}{p}", p, dtype=dtype) for p in ("A_log", "D", "dt_bias")),
        rule(f"{mixer}.norm.weight", "gate_norm"),
        rule(f"{mixer}.out_proj.weight", "out"),
    )


def mtp_fusion(H: int) -> Block:
    """What opens an MTP depth: two norms and the projection of [embedding | hidden] columns."""
    params = (Param("enorm", (H,)), Param("hnorm", (H,)), Param("eh_proj", (H, 2 * H)))
    rows: tuple[Row, ...] = (
        rule("enorm.weight", "enorm"),
        rule("hnorm.weight", "hnorm"),
        rule("eh_proj.weight", "eh_proj"),
        *te("enorm", "hnorm", "eh_proj"),
    )
    return Block(params, {"megatron": rows})


def mtp_final_norm(H: int) -> Block:
    """What closes an MTP depth."""
    rows: tuple[Row, ...] = (rule("final_layernorm.weight", "final_layernorm"), *te("final_layernorm"))
    return Block((Param("final_layernorm", (H,)),), {"megatron": rows})
