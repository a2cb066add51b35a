"""Kimi delta attention with its pre-norm: linear attention in which every channel forgets at a rate of its own.

H hidden   Q heads   D head dim   W conv width   R rank of the forget gate's and the output gate's projection
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import renamed, te, with_hf
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Param, Row, only, rule

QKV = {"q": "query", "k": "key", "v": "value"}
DIRECT = {"f": "g", "g": "gate"}  # gates that are projected directly, as parts of Megatron's input projection


@dataclass(frozen=True, slots=True)
class Kda:
    """Sizes of Kimi delta attention; R is None where the gates are projected directly."""

    H: int
    Q: int
    D: int
    W: int
    R: int | None = None

    @property
    def gates(self) -> dict[str, tuple[int, int]]:
        """The matrices of both gates: name and shape."""
        rows = self.Q * self.D
        if self.R is None:
            return dict.fromkeys(DIRECT, (rows, self.H))
        return {
            f"{g}_{part}": shape for g in DIRECT for part, shape in (("a", (self.R, self.H)), ("b", (rows, self.R)))
        }


def kda(d: Kda) -> Block:
    """The names are those of Megatron-LM's development branch: queries, keys, values, and gates that are projected
    directly share a matrix, whose parts torch_dist keeps apart, as it does for a gated delta net."""
    s, rows = "self_attention", d.Q * d.D
    apart = d.R is not None
    params = (
        Param("norm", (d.H,)),
        *(Param(p, (rows, d.H), cut=0) for p in QKV),
        *(Param(f"{p}_conv", (rows, 1, d.W), high_precision=True, cut=0) for p in QKV),
        *(Param(g, shape, cut=None if g.endswith("_a") else 0) for g, shape in d.gates.items()),
        Param("A_log", (d.Q,), high_precision=True, cut=0),
        Param("dt_bias", (rows,), high_precision=True, cut=0),
        Param("beta", (d.Q, d.H), unquantised=True),
        Param("out_norm", (d.D,)),
        Param("o", (d.H, rows), cut=1),
    )
    inputs = QKV if apart else {**QKV, **DIRECT}
    parts = [rule(f"{s}.in_proj.weight.{name}", p) for p, name in inputs.items()]
    parts += [rule(f"{s}.conv1d.weight.{name}", f"{p}_conv") for p, name in QKV.items()]
    fused = (
        rule(f"{s}.in_proj.weight", *inputs, op=Concat(0)),
        rule(f"{s}.conv1d.weight", *(f"{p}_conv" for p in QKV), op=Concat(0)),
    )
    gates = tuple(d.gates) if apart else ()
    names: tuple[Row, ...] = (
        rule("input_layernorm.weight", "norm"),
        *only(*parts, keys="dist"),
        *only(*fused, keys="state_dict"),
        *renamed(*((f"{s}.{g}_proj.weight", g) for g in gates)),
        *renamed(*((f"{s}.{p}", p) for p in ("A_log", "dt_bias"))),
        *renamed((f"{s}.beta_proj.weight", "beta"), (f"{s}.out_norm.weight", "out_norm")),
        rule(f"{s}.out_proj.weight", "o"),
        *te("input_layernorm", f"{s}.out_norm", *(f"{s}.{m}_proj" for m in ("in", *gates, "beta", "out"))),
    )
    return Block(params, {"megatron": names})


def kimi_kda(d: Kda, norm: str = "input_layernorm", module: str = "self_attn") -> Block:
    """The same with the Hugging Face names of Kimi-Linear; transformers holds one convolution, and a forget gate."""
    shared = (
        rule(f"{norm}.weight", "norm"),
        *(rule(f"{module}.{p}_proj.weight", p) for p in QKV),
        rule(f"{module}.b_proj.weight", "beta"),
        rule(f"{module}.o_norm.weight", "out_norm"),
        rule(f"{module}.o_proj.weight", "o"),
    )
    own = (
        *(rule(f"{module}.{p}_conv1d.weight", f"{p}_conv") for p in QKV),
        *(rule(f"{module}.{g}_proj.weight", g) for g in d.gates),
        *(rule(f"{module}.{p}", p) for p in ("A_log", "dt_bias")),
    )
    held = (
        rule(f"{module}.conv1d.weight", *(f"{p}_conv" for p in QKV), op=Concat(0)),
        *(rule(f"{module}.{'forget_gate.' if g[0] == 'f' else ''}{g}_proj.weight", g) for g in d.gates),
        *(rule(f"{module}.forget_gate.{p}", p) for p in ("A_log", "dt_bias")),
    )
    return with_hf(kda(d), *shared, *own, native=(*shared, *held))
