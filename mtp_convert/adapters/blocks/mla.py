"""Multi-head latent attention with its pre-norm, in Megatron's names and in DeepSeek's, with the optional indexer.

H hidden   Q heads   N head dim without rope   R head dim with rope   V value head dim   A query rank   B key/value rank
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import renamed, te, with_hf
from mtp_convert.mapping.rules import Block, Param, Row


@dataclass(frozen=True, slots=True)
class Mla:
    """Sizes of a latent attention block; A is None when queries are projected directly.

    Rows of a query head are [without rope; with rope], rows of a key/value head are [key; value].
    """

    H: int
    Q: int
    N: int
    R: int
    V: int
    A: int | None
    B: int


def mla(d: Mla) -> Block:
    """Both ranks have a norm, which TransformerEngine keeps in the projection behind it."""
    queries = d.Q * (d.N + d.R)
    s = "self_attention"
    params = [
        Param("norm", (d.H,)),
        Param("kv_a", (d.B + d.R, d.H)),
        Param("kv_a_norm", (d.B,)),
        Param("kv_b", (d.Q * (d.N + d.V), d.B)),
        Param("o", (d.H, d.Q * d.V)),
    ]
    names = [
        ("input_layernorm.weight", "norm"),
        (f"{s}.linear_kv_down_proj.weight", "kv_a"),
        (f"{s}.{{kv_norm}}", "kv_a_norm"),
        (f"{s}.linear_kv_up_proj.weight", "kv_b"),
        (f"{s}.linear_proj.weight", "o"),
    ]
    modules = ["input_layernorm", f"{s}.linear_kv_down_proj", f"{s}.linear_kv_up_proj", f"{s}.linear_proj"]
    if d.A is None:
        params.append(Param("q", (queries, d.H)))
        names.append((f"{s}.linear_q_proj.weight", "q"))
        modules.append(f"{s}.linear_q_proj")
    else:
        params += [Param("q_a", (d.A, d.H)), Param("q_a_norm", (d.A,)), Param("q_b", (queries, d.A))]
        names += [
            (f"{s}.linear_q_down_proj.weight", "q_a"),
            (f"{s}.{{q_norm}}", "q_a_norm"),
            (f"{s}.linear_q_up_proj.weight", "q_b"),
        ]
        modules += [f"{s}.linear_q_down_proj", f"{s}.linear_q_up_proj"]
    return Block(tuple(params), {"megatron": (*renamed(*names), *te(*modules))})


def deepseek_mla(d: Mla, norm: str = "input_layernorm", module: str = "self_attn") -> Block:
    """The same with DeepSeek-V3's Hugging Face names."""
    rows: list[Row] = [
        *renamed(
            (f"{norm}.weight", "norm"),
            (f"{module}.kv_a_proj_with_mqa.weight", "kv_a"),
            (f"{module}.kv_a_layernorm.weight", "kv_a_norm"),
            (f"{module}.kv_b_proj.weight", "kv_b"),
            (f"{module}.o_proj.weight", "o"),
        )
    ]
    if d.A is None:
        rows += renamed((f"{module}.q_proj.weight", "q"))
    else:
        rows += renamed(
            (f"{module}.q_a_proj.weight", "q_a"),
            (f"{module}.q_a_layernorm.weight", "q_a_norm"),
            (f"{module}.q_b_proj.weight", "q_b"),
        )
    return with_hf(mla(d), *rows)
