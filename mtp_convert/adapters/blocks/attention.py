"""Grouped-query attention with its norm, in Megatron's fused names and in Llama's.

H hidden   Q query heads   K key/value heads   D head dim   V head dim of the values
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import norm_rows, te, te_attention, with_hf
from mtp_convert.mapping.ops import Appended, Grouped
from mtp_convert.mapping.rules import Block, Param, Row, rule


@dataclass(frozen=True, slots=True)
class Attention:
    """Sizes of a grouped-query attention block, and which params it has beside q, k, v, o.

    gated: every query head has D output gates, stored behind its query rows. head_gate: it has a single one instead.
    sink: it has a logit of its own in the softmax. post_norm: the norm is behind o instead of in front of q, k and v;
    the names are those of Megatron-Bridge. V: 0 where it is D.
    """

    H: int
    Q: int
    K: int
    D: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    gated: bool = False
    post_norm: bool = False
    head_gate: bool = False
    sink: bool = False
    V: int = 0


def attention(d: Attention) -> Block:
    """Megatron interleaves q, (gate,) k, v per KV group; single gates are rows below all of them."""
    V = d.V or d.D
    heads = {"q": d.Q * d.D, **({"gate": d.Q * d.D} if d.gated else {}), "k": d.K * d.D, "v": d.K * V}
    params = [
        Param("norm", (d.H,)),
        *(Param(p, (n, d.H), cut=0) for p, n in heads.items()),
        Param("o", (d.H, d.Q * V), cut=1),
    ]
    fused = rule("self_attention.linear_qkv.weight", *heads, op=Grouped(d.K))
    if d.head_gate:
        params.append(Param("head_gate", (d.Q, d.H), cut=0, unquantised=True))
        fused = rule("self_attention.linear_qkv.weight", *heads, "head_gate", op=Appended(Grouped(d.K)))
    rows: list[Row] = [
        *norm_rows("{attention_norm}", "self_attention.linear_proj", behind=d.post_norm),
        fused,
        rule("self_attention.linear_proj.weight", "o"),
        *te("self_attention.linear_qkv", "self_attention.linear_proj"),
        *te_attention("self_attention.core_attention"),
    ]
    if d.qkv_bias:
        params += [Param(f"{p}_bias", (n,), cut=0) for p, n in heads.items()]
        rows.append(rule("self_attention.linear_qkv.bias", *(f"{p}_bias" for p in heads), op=Grouped(d.K)))
    if d.o_bias:
        params.append(Param("o_bias", (d.H,)))
        rows.append(rule("self_attention.linear_proj.bias", "o_bias"))
    if d.qk_norm:
        params += [Param(f"{p}_norm", (d.D,)) for p in "qk"]
        rows += [rule(f"self_attention.{p}_layernorm.weight", f"{p}_norm") for p in "qk"]
        rows += te("self_attention.q_layernorm", "self_attention.k_layernorm")
    if d.sink:
        params.append(Param("sink", (d.Q,), high_precision=True, cut=0))
        rows.append(rule("self_attention.core_attention.softmax_offset", "sink"))
    return Block(tuple(params), {"megatron": tuple(rows)})


def llama_attention(d: Attention, norm: str = "input_layernorm", module: str = "self_attn") -> Block:
    """The same with Hugging Face names as Llama has them; a gate shares q_proj, head by head."""
    q = ("q", "gate") if d.gated else ("q",)
    op = Grouped(d.Q) if d.gated else None
    rows: list[Row] = [
        rule(f"{norm}.weight", "norm"),
        rule(f"{module}.q_proj.weight", *q, op=op),
        *(rule(f"{module}.{p}_proj.weight", p) for p in "kvo"),
    ]
    if d.qkv_bias:
        rows.append(rule(f"{module}.q_proj.bias", *(f"{p}_bias" for p in q), op=op))
        rows += [rule(f"{module}.{p}_proj.bias", f"{p}_bias") for p in "kv"]
    if d.o_bias:
        rows.append(rule(f"{module}.o_proj.bias", "o_bias"))
    if d.qk_norm:
        rows += [rule(f"{module}.{p}_norm.weight", f"{p}_norm") for p in "qk"]
    if d.head_gate:
        rows.append(rule(f"{module}.g_proj.weight", "head_gate"))
    if d.sink:
        rows.append(rule(f"{module}.sinks", "sink"))
    return with_hf(attention(d), *rows)
