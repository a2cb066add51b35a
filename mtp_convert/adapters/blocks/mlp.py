"""Dense MLP with its norm, gated or not, in Megatron's names and in Llama's.

H hidden   F inner size
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_convert.adapters.blocks.base import halves, norm_rows, te, with_hf
from mtp_convert.mapping.rules import Block, Param, Row, rule


@dataclass(frozen=True, slots=True)
class Mlp:
    """Sizes of an MLP block; `gated`: down(act(gate(x)) * up(x)) instead of down(act(up(x))).

    post_norm: the norm is behind the second matrix instead of in front of the first, as in attention.
    """

    H: int
    F: int
    bias: bool = False
    gated: bool = False
    post_norm: bool = False

    @property
    def first(self) -> tuple[str, ...]:
        """Params of the first matrix, in Megatron's row order."""
        return ("gate", "up") if self.gated else ("up",)


def mlp(d: Mlp) -> Block:
    """Megatron's linear_fc1 holds the gate above the up projection."""
    params = [Param("norm", (d.H,)), *(Param(p, (d.F, d.H), cut=0) for p in d.first), Param("down", (d.H, d.F), cut=1)]
    rows: list[Row] = [
        *norm_rows("{mlp_norm}", "mlp.linear_fc2", behind=d.post_norm),
        *halves("mlp.linear_fc1.weight", *d.first),
        rule("mlp.linear_fc2.weight", "down"),
        *te("mlp.linear_fc1", "mlp.linear_fc2"),
    ]
    if d.bias:
        params += [*(Param(f"{p}_bias", (d.F,), cut=0) for p in d.first), Param("down_bias", (d.H,))]
        rows += [
            *halves("mlp.linear_fc1.bias", *(f"{p}_bias" for p in d.first)),
            rule("mlp.linear_fc2.bias", "down_bias"),
        ]
    return Block(tuple(params), {"megatron": tuple(rows)})


def llama_mlp(d: Mlp, norm: str = "post_attention_layernorm", module: str = "mlp") -> Block:
    """The same with Llama's Hugging Face names."""
    rows = [rule(f"{module}.{p}_proj.weight", p) for p in (*d.first, "down")]
    bias = [rule(f"{module}.{p}_proj.bias", f"{p}_bias") for p in (*d.first, "down")] if d.bias else []
    return with_hf(mlp(d), rule(f"{norm}.weight", "norm"), *rows, *bias)
