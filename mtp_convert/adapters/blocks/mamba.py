"""Mamba2 mixer with its pre-norm.

H hidden   N heads   C inner size = N x head dim   G groups x state size   W conv width
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import te
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Param, Row, only, rule


@dataclass(frozen=True, slots=True)
class Mamba:
    """Sizes of a Mamba2 mixer."""

    H: int
    N: int
    head: int
    G: int
    W: int


def mamba(d: Mamba) -> Block:
    """Pre-norm Mamba2 mixer; torch_dist keeps the parts of the fused projections apart because TP cuts each of them."""
    C = d.N * d.head
    conv = {"x": C, "B": d.G, "C": d.G}
    proj = {"z": C, **conv, "dt": d.N}
    params = (
        Param("norm", (d.H,)),
        *(Param(f"in_proj.{p}", (n, d.H), cut=0) for p, n in proj.items()),
        *(Param(f"conv.{p}", (n, 1, d.W), cut=0) for p, n in conv.items()),
        *(Param(f"conv_bias.{p}", (n,), cut=0) for p, n in conv.items()),
        *(Param(p, (d.N,), high_precision=True, cut=0) for p in ("A_log", "D", "dt_bias")),
        Param("gate_norm", (C,), cut=0),
        Param("out", (d.H, C), cut=1),
    )
    apart = (
        *(rule(f"mixer.in_proj.weight.{p}", f"in_proj.{p}") for p in proj),
        *(rule(f"mixer.conv1d.weight.{p}", f"conv.{p}") for p in conv),
        *(rule(f"mixer.conv1d.bias.{p}", f"conv_bias.{p}") for p in conv),
    )
    fused = (
        rule("mixer.in_proj.weight", *(f"in_proj.{p}" for p in proj), op=Concat(0)),
        rule("mixer.{conv}weight", *(f"conv.{p}" for p in conv), op=Concat(0)),
        rule("mixer.{conv}bias", *(f"conv_bias.{p}" for p in conv), op=Concat(0)),
    )
    rows: tuple[Row, ...] = (
        rule("{mamba_norm}", "norm"),
        *only(*apart, keys="dist"),
        *only(*fused, keys="state_dict"),
        *(rule(f"mixer.{p}", p) for p in ("A_log", "D", "dt_bias")),
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
