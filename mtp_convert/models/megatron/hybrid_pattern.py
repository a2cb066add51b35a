"""The layer pattern of a hybrid model: one symbol per layer, `main/mtp/mtp/...`.

Every part behind a `/` is one MTP depth, and all of them are equal. A `|` inside the main part is a pipeline stage
boundary. Every layer holds one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

MAMBA, GDN, ATTENTION, MLA, MLP, MOE = "M", "G", "*", "+", "-", "E"
COMPRESSED = "C"  # compressed attention, a block of GPT models alone
SYMBOLS = MAMBA + GDN + ATTENTION + MLA + MLP + MOE


@dataclass(frozen=True)
class HybridPattern:
    """A pattern taken apart: the main part's stages, the symbols of one MTP depth, the number of depths."""

    stages: tuple[str, ...]
    mtp: str = ""
    mtp_depths: int = 0

    @classmethod
    def parse(cls, pattern: str) -> Self:
        """From such as `M*ME|-M*E/*E/*E`; ValueError for unknown symbols, unequal depths or `*` beside `+`."""
        main, *depths = pattern.split("/")
        depths = [depth for depth in depths if depth]
        problems = []
        if unknown := sorted(set(main.replace("|", "") + "".join(depths)) - set(SYMBOLS)):
            problems.append(f"unknown symbols {unknown}, known are {SYMBOLS!r}")
        if len(set(depths)) > 1:
            problems.append(f"MTP depths differ: {depths}")
        if {ATTENTION, MLA} <= set(pattern):
            problems.append("attention and latent attention in one model")
        if not main.replace("|", ""):
            problems.append("no main layers")
        if problems:
            raise ValueError(f"layer pattern {pattern!r}: {'; '.join(problems)}")
        return cls(tuple(main.split("|")), depths[0] if depths else "", len(depths))

    @property
    def main(self) -> str:
        """The main layers of all stages."""
        return "".join(self.stages)

    def __str__(self) -> str:
        return "/".join(["|".join(self.stages), *[self.mtp] * self.mtp_depths])
