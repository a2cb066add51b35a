"""Gated delta net with its pre-norm: the linear attention of Qwen3-Next and its successors.

H hidden   K key heads   V value heads, a multiple of K   D key head dim   E value head dim   W conv width
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import te, with_hf
from mtp_convert.mapping.ops import Concat, Grouped, Op
from mtp_convert.mapping.rules import Block, Param, Row, only, rule

QKV = ("query", "key", "value")
HEADS = ("beta", "alpha")  # the step size and the decay of a head
PROJECTIONS = (*QKV, "z", *HEADS)  # z gates the output


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Sizes of a gated delta net; `centred`: Megatron counts the weight of its output norm from 0."""

    H: int
    K: int
    V: int
    D: int
    E: int
    W: int
    centred: bool = True

    @property
    def rows(self) -> dict[str, int]:
        """Rows of every part of the input projection, in Megatron's order."""
        keys, values = self.K * self.D, self.V * self.E
        return dict(zip(PROJECTIONS, (keys, keys, values, values, self.V, self.V), strict=True))


def delta_net(d: DeltaNet) -> Block:
    """torch_dist keeps the parts of the fused projections apart because TP cuts each of them."""
    s = "self_attention"
    params = (
        Param("norm", (d.H,)),
        *(Param(f"in_proj.{p}", (n, d.H), cut=0, unquantised=p in HEADS) for p, n in d.rows.items()),
        *(Param(f"conv.{p}", (d.rows[p], 1, d.W), cut=0) for p in QKV),
        *(Param(p, (d.V,), high_precision=True, cut=0) for p in ("A_log", "dt_bias")),
        Param("out_norm", (d.E,)),
        Param("out", (d.H, d.V * d.E), cut=1),
    )
    apart = (
        *(rule(f"{s}.in_proj.weight.{p}", f"in_proj.{p}") for p in PROJECTIONS),
        *(rule(f"{s}.conv1d.weight.{p}", f"conv.{p}") for p in QKV),
    )
    fused = (
        rule(f"{s}.in_proj.weight", *(f"in_proj.{p}" for p in PROJECTIONS), op=Concat(0)),
        rule(f"{s}.conv1d.weight", *(f"conv.{p}" for p in QKV), op=Concat(0)),
    )
    rows: tuple[Row, ...] = (
        rule("{delta_norm}", "norm"),
        *only(*apart, keys="dist"),
        *only(*fused, keys="state_dict", shards="whole"),
        *only(*apart, keys="state_dict", shards="single"),
        *(rule(f"{s}.{p}", p) for p in ("A_log", "dt_bias")),
        rule(f"{s}.out_norm.weight", "out_norm", plus=-1.0 if d.centred else 0.0),
        rule(f"{s}.out_proj.weight", "out"),
        *te(f"{s}.in_proj", f"{s}.out_norm", f"{s}.out_proj"),
    )
    return Block(params, {"megatron": rows})


def qwen_delta_net(d: DeltaNet, *, by_head: bool, norm: str = "input_layernorm", module: str = "linear_attn") -> Block:
    """The same with Qwen's Hugging Face names.

    by_head: two matrices hold the projections, their rows by key head: [query, key, value.., z..] and [beta.., alpha..]
    (Qwen3-Next); else query, key and value share one matrix, and z, beta and alpha have their own (Qwen3.5).
    """
    qkvz, ba = PROJECTIONS[:4], PROJECTIONS[4:]
    fused: dict[str, tuple[tuple[str, ...], Op]]
    if by_head:
        fused = {"qkvz": (qkvz, Grouped(d.K)), "ba": (ba, Grouped(d.K))}
    else:
        fused = {"qkv": (QKV, Concat(0)), "z": (("z",), Concat(0)), "b": (ba[:1], Concat(0)), "a": (ba[1:], Concat(0))}
    return with_hf(
        delta_net(d),
        rule(f"{norm}.weight", "norm"),
        *(
            rule(f"{module}.in_proj_{name}.weight", *(f"in_proj.{p}" for p in parts), op=op)
            for name, (parts, op) in fused.items()
        ),
        rule(f"{module}.conv1d.weight", *(f"conv.{p}" for p in QKV), op=Concat(0)),
        *(rule(f"{module}.{p}", p) for p in ("A_log", "dt_bias")),
        rule(f"{module}.norm.weight", "out_norm"),
        rule(f"{module}.out_proj.weight", "out"),
    )
