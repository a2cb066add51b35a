"""Hyper-connections: how a sub-layer reads and writes several residual streams.

H hidden   s streams   M mixes: s to read, s to write, s * s between streams
"""

from __future__ import annotations

from mtp_convert.adapters.blocks.base import renamed, with_hf
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Param, Row, rule

SCALES = ("pre", "post", "res")


def hyper_connection(H: int, s: int, *, hf: str, tree: str, megatron: str) -> Block:
    """The mapping [M, s*H], its bias [M] and three scales [1], which Megatron keeps apart.

    Args:
        hf, tree, megatron: what its tensors begin with in the release, in the module tree, and in Megatron.
    """
    M = (2 + s) * s
    params = (
        Param("fn", (M, s * H), high_precision=True),
        Param("base", (M,), high_precision=True),
        *(Param(scale, (1,), high_precision=True) for scale in SCALES),
    )
    rows: tuple[Row, ...] = (
        *renamed((f"{megatron}.mapping_proj.weight", "fn"), (f"{megatron}.bias", "base")),
        *renamed(*((f"{megatron}.alpha_{scale}", scale) for scale in SCALES)),
    )

    def together(name: str) -> tuple[Row, ...]:
        return (rule(f"{name}fn", "fn"), rule(f"{name}base", "base"), rule(f"{name}scale", *SCALES, op=Concat(0)))

    return with_hf(Block(params, {"megatron": rows}), *together(f"{hf}_"), native=together(f"{tree}."))
