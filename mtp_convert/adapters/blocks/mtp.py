"""What opens and closes an MTP depth. H hidden."""

from __future__ import annotations

from mtp_convert.adapters.blocks.base import te, with_hf
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Param, Row, rule


def mtp_fusion(H: int) -> Block:
    """Two norms and the projection of [embedding | hidden] columns."""
    params = (
        Param("enorm", (H,)),
        Param("hnorm", (H,)),
        Param("eh_proj.e", (H, H), cut=0, unquantised=True),
        Param("eh_proj.h", (H, H), cut=0, unquantised=True),
    )
    rows: tuple[Row, ...] = (
        rule("enorm.weight", "enorm"),
        rule("hnorm.weight", "hnorm"),
        rule("eh_proj.weight", "eh_proj.e", "eh_proj.h", op=Concat(1)),
        *te("enorm", "hnorm", "eh_proj"),
    )
    return Block(params, {"megatron": rows})


def hf_fusion(
    H: int,
    enorm: str = "enorm",
    hnorm: str = "hnorm",
    eh_proj: str = "eh_proj",
    *,
    hidden_first: bool = False,
) -> Block:
    """The same with Hugging Face names; `hidden_first`: columns are [hidden | embedding]."""
    halves = ("eh_proj.h", "eh_proj.e") if hidden_first else ("eh_proj.e", "eh_proj.h")
    own = (
        rule(f"{enorm}.weight", "enorm"),
        rule(f"{hnorm}.weight", "hnorm"),
        rule(f"{eh_proj}.weight", *halves, op=Concat(1)),
    )
    tree = (
        rule("enorm.weight", "enorm"),
        rule("hnorm.weight", "hnorm"),
        rule("eh_proj.weight", "eh_proj.e", "eh_proj.h", op=Concat(1)),
    )
    return with_hf(mtp_fusion(H), *own, native=tree)


def mtp_final_norm(H: int, name: str = "final_layernorm") -> Block:
    """The norm behind the last block of a depth; `name` is the Hugging Face one."""
    rows: tuple[Row, ...] = (rule("final_layernorm.weight", "final_layernorm"), *te("final_layernorm"))
    block = Block((Param("final_layernorm", (H,)),), {"megatron": rows})
    native = (rule("final_layernorm.weight", "final_layernorm"),)
    return with_hf(block, rule(f"{name}.weight", "final_layernorm"), native=native)
