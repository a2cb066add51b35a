"""Wrong tables: each differs from the Nemotron-H table in one rule, is sound in itself, and must be caught by numbers.

Mutant(name, source, change)     change: every `Placed` of the true table -> the wrong one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from _kit import AUTOMODEL, TINY

from mtp_convert.mapping.ops import Concat, Grouped, Permute
from mtp_convert.mapping.rules import Block, Placed, Row, Rule

Change = Callable[[Placed], Placed]
HYBRID = AUTOMODEL / "nemotron_mtpM"  # all four kinds of block, also inside MTP; two depths
TURN = Permute((1, 0))


@dataclass(frozen=True)
class Mutant:
    """One wrong table."""

    name: str
    source: Path
    change: Change


def in_rules(change: Callable[[Rule], Rule]) -> Change:
    """Change Megatron rules; the Hugging Face side stays true."""

    def changed(row: Row) -> Row:
        return change(row) if isinstance(row, Rule) else row

    def place(p: Placed) -> Placed:
        rows = {**p.block.rows, "megatron": tuple(map(changed, p.block.rows["megatron"]))}
        return replace(p, block=replace(p.block, rows=rows))

    return place


def swap(a: str, b: str) -> Change:
    """Two params change places."""
    other = {a: b, b: a}
    return in_rules(lambda r: replace(r, params=tuple(other.get(p, p) for p in r.params)))


def swap_turned(a: str, b: str) -> Change:
    """Two params of transposed shapes change places."""
    other = {a: b, b: a}

    def change(r: Rule) -> Rule:
        return replace(r, params=(other[r.params[0]],), op=TURN) if r.params[0] in other else r

    return in_rules(change)


def turn(param: str) -> Change:
    """A square matrix is transposed."""
    return in_rules(lambda r: replace(r, op=TURN) if r.params == (param,) else r)


def group(op: Concat | Grouped) -> Change:
    """q, k and v interleaved in another way."""
    return in_rules(lambda r: replace(r, op=op) if isinstance(r.op, Grouped) else r)


def shift_experts(*params: str) -> Change:
    """Expert e is stored at place e + 1 (Megatron's rows count from another start)."""

    def place(p: Placed) -> Placed:
        if "e" not in p.block.domains:
            return p
        experts = list(p.block.domains["e"])
        own = {"e": experts, "s": [*experts[1:], *experts[:1]]}
        rows = tuple(_shifted(r, params) for r in p.block.rows["megatron"])
        return replace(p, block=Block(p.block.params, {**p.block.rows, "megatron": rows}, own))

    return place


def _shifted(row: Row, params: tuple[str, ...]) -> Row:
    if not isinstance(row, Rule) or row.params[0] not in params:
        return row
    return replace(row, params=tuple(p.replace("{e}", "{s}") for p in row.params), over=("s",))


def other_depth(param: str, p: Placed) -> Placed:
    """Depth 0 and 1 of the Hugging Face names change places (`param` "": all of it, else only this block)."""
    k = p.at.get("k")
    if k not in (0, 1) or (param and param not in {q.name for q in p.block.params}):
        return p
    pattern = len("M*-E")
    return replace(p, at={**p.at, "f": p.at["f"] + (pattern if k == 0 else -pattern)})


def other_layer(p: Placed) -> Placed:
    """The first and the last layer of `M*E-ME` that are Mamba change places in the Hugging Face names."""
    first, last = 0, 4
    if p.at.keys() != {"i"} or p.at["i"] not in (first, last):
        return p
    hf = p.prefixes["hf"].replace("{i}", str(first + last - p.at["i"]))
    return replace(p, prefixes={**p.prefixes, "hf": hf})


def all_mutants() -> Iterator[Mutant]:
    """Every wrong table."""
    hybrid: dict[str, Change] = {
        "k and v": swap("k", "v"),
        "q and o": swap("q", "o"),
        "o transposed": turn("o"),
        "qkv not interleaved": group(Concat(0)),
        "qkv interleaved by half groups": group(Grouped(4)),
        "in_proj z and x": swap("in_proj.z", "in_proj.x"),
        "out_proj transposed": turn("out"),
        "enorm and hnorm": swap("enorm", "hnorm"),
        "eh_proj halves": swap("eh_proj.e", "eh_proj.h"),
        "embedding and head": swap("embedding", "head"),
        "experts shifted": shift_experts("experts.{e}.up", "experts.{e}.down"),
        "expert up shifted": shift_experts("experts.{e}.up"),
        "expert down shifted": shift_experts("experts.{e}.down"),
        "expert up and down": swap_turned("experts.{e}.up", "experts.{e}.down"),
        "shared up and down": swap_turned("shared.up", "shared.down"),
        "dense up and down": swap_turned("up", "down"),
        "depth order": partial(other_depth, ""),
        "final norms of depths": partial(other_depth, "final_layernorm"),
        "fusions of depths": partial(other_depth, "enorm"),
        "attention of depths": partial(other_depth, "q"),
        "two layers": other_layer,
    }
    hybrid |= {f"{part} B and C": swap(f"{part}.B", f"{part}.C") for part in ("in_proj", "conv", "conv_bias")}
    hybrid |= {f"{a} and {b}": swap(a, b) for a, b in combinations(("A_log", "D", "dt_bias"), 2)}
    yield from (Mutant(name, HYBRID, change) for name, change in hybrid.items())
    yield Mutant("latent in and out", TINY, swap_turned("latent_in", "latent_out"))
    yield Mutant("latent expert up and down", TINY, swap_turned("experts.{e}.up", "experts.{e}.down"))
