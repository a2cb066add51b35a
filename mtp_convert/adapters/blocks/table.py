"""Params as a text table, for blocks whose tensors are one param each: a line is a param, its shape, and its names.

    table("hf native megatron", '''
        q_a   A,H     wq_a.weight   q_a_proj.weight   linear_q_down_proj.weight
        q_b   Q*D/,A  wq_b.weight   q_b_proj.weight   linear_q_up_proj.weight
    ''', hf="attn.", native="self_attn.", megatron="self_attention.")

Shapes are products of letters, looked up in the sizes of the family. A slash behind an axis says that tensor
parallelism cuts it. `=` repeats the name one column to the left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from mtp_convert.mapping.rules import Block, Param, Row, rule


@dataclass(frozen=True, slots=True)
class Line:
    """One param: its shape in letters, and its tensor's name in every layout."""

    param: str
    shape: str
    names: Mapping[str, str]

    def under(self, param: str, **prefixes: str) -> Line:
        """The same line for another place: prefixes of the param and of the names."""
        names = {layout: prefixes.get(layout, "") + name for layout, name in self.names.items()}
        return replace(self, param=param + self.param, names=names)


def table(columns: str, text: str, **prefixes: str) -> tuple[Line, ...]:
    """Read a table; `prefixes` stand in front of every name of a column."""
    layouts = columns.split()
    lines = []
    for words in filter(None, map(str.split, text.splitlines())):
        param, shape, *names = words
        for i, name in enumerate(names):
            names[i] = names[i - 1] if name == "=" else prefixes.get(layouts[i], "") + name
        lines.append(Line(param, shape, dict(zip(layouts, names, strict=True))))
    return tuple(lines)


def params_of(
    lines: Sequence[Line],
    sizes: Mapping[str, int],
    *,
    high_precision: Collection[str] = (),
    unquantised: Collection[str] = (),
) -> list[Param]:
    """The params, with numbers for letters; those of these names are as `Param` says."""
    return [
        replace(_param(line, sizes), high_precision=line.param in high_precision, unquantised=line.param in unquantised)
        for line in lines
    ]


def _param(line: Line, sizes: Mapping[str, int]) -> Param:
    axes = line.shape.split(",")
    shape = tuple(prod(sizes[letter] for letter in axis.rstrip("/").split("*")) for axis in axes)
    cut = next((i for i, axis in enumerate(axes) if axis.endswith("/")), None)
    return Param(line.param, shape, cut=cut)


def rows_of(lines: Sequence[Line], layout: str, *, float32: Collection[str] = ()) -> list[Row]:
    """The rows of one column; the tensors of the params in `float32` are always stored so."""
    return [rule(ln.names[layout], ln.param, dtype="F32" if ln.param in float32 else "") for ln in lines]


def block_of(lines: Sequence[Line], sizes: Mapping[str, int], *, high_precision: Collection[str] = ()) -> Block:
    """The block of a table whose columns are layouts."""
    rows = {layout: tuple(rows_of(lines, layout)) for layout in lines[0].names}
    return Block(tuple(params_of(lines, sizes, high_precision=high_precision)), rows)
