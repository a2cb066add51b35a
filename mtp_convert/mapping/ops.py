"""The closed set of ops: how params lie side by side in one layout tensor.

An op knows shapes only. `place(shapes)` gives the shape of the tensor and, for every param, the view of it inside the
tensor. Nothing here says which side is read, so one op serves both directions.

    Same            tensor = param
    Concat(d)       [a; b; c] along dimension d
    Grouped(g)      rows [a_0; b_0; c_0; a_1; b_1; c_1; ...]: every param's rows are cut into g groups (Megatron's QKV)
    Appended(of)    rows of the last param below what another op makes of the others
    Permute(order)  dimension j of the tensor is dimension order[j] of the param, or of what another op makes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mtp_convert.mapping.views import Axis, Shape, View, whole

Placed = tuple[Shape, tuple[View, ...]]


class Op(Protocol):
    """A bijection between params and one tensor."""

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Shape of the tensor, and one view per param."""


@dataclass(frozen=True, slots=True)
class Same:
    """The tensor is the param."""

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Take exactly one param."""
        (shape,) = shapes
        return shape, (whole(shape),)


@dataclass(frozen=True, slots=True)
class Concat:
    """Params one after another along `dim`; all other dimensions are equal."""

    dim: int = 0

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Take one or more params."""
        views, total = [], 0
        for shape in shapes:
            if _without(shape, self.dim) != _without(shapes[0], self.dim):
                raise ValueError(f"cannot concatenate shapes {list(shapes)} along {self.dim}")
            views.append(whole(shape).shifted(self.dim, total))
            total += shape[self.dim]
        first = shapes[0]
        return (*first[: self.dim], total, *first[self.dim + 1 :]), tuple(views)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows interleaved by group: `[q_0..q_{r-1}, k, v]` once per KV group. Works on weights and on biases."""

    groups: int

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Take params whose row counts are multiples of `groups`."""
        if any(s[0] % self.groups for s in shapes):
            raise ValueError(f"rows of {list(shapes)} do not divide into {self.groups} groups")
        if any(s[1:] != shapes[0][1:] for s in shapes):
            raise ValueError(f"different columns: {list(shapes)}")
        per_group = sum(s[0] for s in shapes) // self.groups
        views, offset = [], 0
        for shape in shapes:
            rows = shape[0] // self.groups
            rest = tuple(Axis(n, d, 1) for d, n in enumerate(shape) if d)
            axes = (Axis(self.groups, 0, per_group), Axis(rows, 0, 1), *rest)
            views.append(View((offset, *(0,) * (len(shape) - 1)), axes))
            offset += rows
        return (per_group * self.groups, *shapes[0][1:]), tuple(views)


@dataclass(frozen=True, slots=True)
class Appended:
    """Rows of the last param below what `of` makes of the others."""

    of: Op

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Take what `of` takes and one more, with the same columns."""
        *others, last = shapes
        above, views = self.of.place(others)
        if above[1:] != last[1:]:
            raise ValueError(f"cannot append {last} to {above}")
        return (above[0] + last[0], *above[1:]), (*views, whole(last).shifted(0, above[0]))


@dataclass(frozen=True, slots=True)
class Permute:
    """Dimensions of what `of` makes, in another order; `Permute((1, 0))` is the transpose."""

    order: tuple[int, ...]
    of: Op = field(default_factory=Same)

    def place(self, shapes: Sequence[Shape]) -> Placed:
        """Take what `of` takes."""
        shape, views = self.of.place(shapes)
        where = {dim: j for j, dim in enumerate(self.order)}
        return tuple(shape[d] for d in self.order), tuple(
            View(tuple(v.start[d] for d in self.order), tuple(Axis(a.size, where[a.dim], a.step) for a in v.axes))
            for v in views
        )


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])
