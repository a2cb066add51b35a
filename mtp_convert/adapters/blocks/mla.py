"""Multi-head latent attention with its pre-norm, in Megatron's names and in DeepSeek's, with the optional indexer.

H hidden   Q heads   N head dim without rope   R head dim with rope   V value head dim   A query rank   B key/value rank
X indexer heads   Y indexer head dim
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import renamed, te, te_attention, with_hf
from mtp_convert.mapping.family import ConfigError
from mtp_convert.mapping.rules import Block, Param, Row


@dataclass(frozen=True, slots=True)
class Indexer:
    """Sizes of the indexer of sparse attention (DeepSeek-V3.2, GLM-5), which chooses the keys of every query."""

    X: int
    Y: int


@dataclass(frozen=True, slots=True)
class Mla:
    """Sizes of a latent attention block; A is None when queries are projected directly.

    Rows of a query head are [without rope; with rope], rows of a key/value head are [key; value]. shares_indexer: a
    layer of sparse attention without an indexer, which uses the choice of a layer before it.
    """

    H: int
    Q: int
    N: int
    R: int
    V: int
    A: int | None
    B: int
    indexer: Indexer | None = None
    shares_indexer: bool = False


def mla(d: Mla) -> Block:
    """Both ranks have a norm, which TransformerEngine keeps in the projection behind it; sparse attention has modules
    of their own for them, because an indexer reads normed queries."""
    queries = d.Q * (d.N + d.R)
    s = "self_attention"
    params = [
        Param("norm", (d.H,)),
        Param("kv_a", (d.B + d.R, d.H)),
        Param("kv_a_norm", (d.B,)),
        Param("kv_b", (d.Q * (d.N + d.V), d.B), cut=0),
        Param("o", (d.H, d.Q * d.V), cut=1),
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
        params.append(Param("q", (queries, d.H), cut=0))
        names.append((f"{s}.linear_q_proj.weight", "q"))
        modules.append(f"{s}.linear_q_proj")
    else:
        params += [Param("q_a", (d.A, d.H)), Param("q_a_norm", (d.A,)), Param("q_b", (queries, d.A), cut=0)]
        names += [
            (f"{s}.linear_q_down_proj.weight", "q_a"),
            (f"{s}.{{q_norm}}", "q_a_norm"),
            (f"{s}.linear_q_up_proj.weight", "q_b"),
        ]
        modules += [f"{s}.linear_q_down_proj", f"{s}.linear_q_up_proj"]
    rows: list[Row] = [*renamed(*names), *te(*modules)]
    if d.indexer is not None:
        more, found = _indexer(d, d.indexer)
        params, rows = [*params, *more], [*rows, *found]
    if d.indexer is not None or d.shares_indexer:
        rows += te(f"{s}.q_layernorm", f"{s}.kv_layernorm")
    else:  # the core of sparse attention is Megatron-Core's own
        rows += te_attention(f"{s}.core_attention")
    return Block(tuple(params), {"megatron": tuple(rows)})


def _indexer(d: Mla, x: Indexer) -> tuple[list[Param], list[Row]]:
    """The key norm is a LayerNorm."""
    if d.A is None:
        raise ConfigError("an indexer needs a query rank (q_lora_rank)")
    params = [
        Param("indexer.q_b", (x.X * x.Y, d.A)),
        Param("indexer.k", (x.Y, d.H)),
        Param("indexer.k_norm", (x.Y,)),
        Param("indexer.k_norm_bias", (x.Y,)),
        Param("indexer.weights", (x.X, d.H), unquantised=True),
    ]
    module = "self_attention.core_attention.indexer"
    rows: list[Row] = [
        *renamed(
            (f"{module}.linear_wq_b.weight", "indexer.q_b"),
            (f"{module}.linear_wk.weight", "indexer.k"),
            (f"{module}.k_norm.weight", "indexer.k_norm"),
            (f"{module}.k_norm.bias", "indexer.k_norm_bias"),
            (f"{module}.linear_weights_proj.weight", "indexer.weights"),
        ),
        *te(*(f"{module}.{m}" for m in ("linear_wq_b", "linear_wk", "k_norm", "linear_weights_proj"))),
    ]
    return params, rows


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
    if d.indexer is not None:
        rows += renamed(
            (f"{module}.indexer.wq_b.weight", "indexer.q_b"),
            (f"{module}.indexer.wk.weight", "indexer.k"),
            (f"{module}.indexer.k_norm.weight", "indexer.k_norm"),
            (f"{module}.indexer.k_norm.bias", "indexer.k_norm_bias"),
            (f"{module}.indexer.weights_proj.weight", "indexer.weights"),
        )
    return with_hf(mla(d), *rows)
