"""Everything a verification can be told, as one frozen record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.verify.result import LEVELS, Level


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify.

    Token ids are [rows, length], made from `seed`. dtype: of the computation. device: `auto` is a GPU when there is
    one. mode: weights all at once or layer by layer. backend: whose code runs a Megatron checkpoint, empty for this
    package's tree, or `megatron-core`. quick: a sample of layers, each on random input, instead of the whole chain.
    tolerances: largest relative errors by place, in place of the measured thresholds; see `baselines`.
    """

    rows: int = 2
    length: int = 64
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str = "auto"
    mode: Literal["auto", "whole", "streamed"] = "auto"
    levels: Collection[Level] = LEVELS
    backend: str = ""
    quick: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)


def parse_levels(text: str) -> tuple[Level, ...]:
    """`names,bits` as levels, in their order.

    Raises:
        ConvertError: MTP001, naming every word that is none.
    """
    words = [w.strip() for w in text.split(",") if w.strip()]
    unknown = [w for w in words if w not in LEVELS]
    if unknown or not words:
        raise ConvertError(
            "MTP001", Problem("--levels", got=", ".join(unknown) or "nothing", expected=",".join(LEVELS))
        )
    return tuple(level for level in LEVELS if level in words)
