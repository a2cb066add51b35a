"""Aligned views: which element of a tensor is which element of a param, as arithmetic that never touches data.

A param is walked in row-major order over `axes`, a refinement of its shape (rows may be split into groups x rows).
Every axis moves along exactly one dimension of the tensor by `step`. So a view is a bijection between the param and a
part of the tensor, has no direction, and joins with another view of the same param into a copy.

    element g = (g_0, g_1, ...) of the param   <->   tensor[start_d + sum of g_i * step_i over the axes i along d]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Axis(NamedTuple):
    """`size` positions, each `step` further along dimension `dim` of the tensor."""

    size: int
    dim: int
    step: int


@dataclass(frozen=True, slots=True)
class View:
    """Where a param lies inside a tensor."""

    start: Shape
    axes: tuple[Axis, ...]

    def shifted(self, dim: int, by: int) -> View:
        """The same view further along one tensor dimension."""
        start = list(self.start)
        start[dim] += by
        return View(tuple(start), self.axes)

    def under(self, index: int) -> View:
        """The same view inside a tensor with one more leading dimension, at `index` of it."""
        return View((index, *self.start), tuple(Axis(a.size, a.dim + 1, a.step) for a in self.axes))


def whole(shape: Shape) -> View:
    """The view of a param that is the whole tensor."""
    return View((0,) * len(shape), tuple(Axis(n, d, 1) for d, n in enumerate(shape)))


class Side(NamedTuple):
    """One end of a copy: for every grid axis the tensor dimension it walks and the step there."""

    start: Shape
    dims: Shape
    steps: Shape

    def moved(self, origin: Sequence[int]) -> Side:
        """The side of a sub-box whose first element is at grid position `origin`."""
        start = list(self.start)
        for i, o in enumerate(origin):
            if o:
                start[self.dims[i]] += o * self.steps[i]
        return Side(tuple(start), self.dims, self.steps)


class Block(NamedTuple):
    """A box of a param with its place in a source tensor and in a target tensor (coordinates, not bytes)."""

    sizes: Shape
    source: Side
    target: Side

    def narrow(self, origin: Sequence[int], sizes: Shape) -> Block:
        """The sub-box of `sizes` elements at grid position `origin`."""
        return Block(sizes, self.source.moved(origin), self.target.moved(origin))


def join(source: View, target: View) -> Block:
    """The copy between two views of one param.

    Raises:
        ValueError: the two views split the param in ways that do not nest.
    """
    a, b = list(source.axes), list(target.axes)
    sizes: list[int] = []
    left: list[Axis] = []
    right: list[Axis] = []
    while a and b:
        x, y = a.pop(), b.pop()
        n = min(x.size, y.size)
        if max(x.size, y.size) % max(n, 1):
            raise ValueError(f"views do not nest: {source} and {target}")
        if x.size > n:
            a.append(Axis(x.size // n, x.dim, x.step * n))
        if y.size > n:
            b.append(Axis(y.size // n, y.dim, y.step * n))
        sizes.append(n)
        left.append(Axis(n, x.dim, x.step))
        right.append(Axis(n, y.dim, y.step))
    if prod(x.size for x in a) * prod(y.size for y in b) != 1:
        raise ValueError(f"views of different size: {source} and {target}")
    return Block(tuple(reversed(sizes)), _side(source.start, left), _side(target.start, right))


def _side(start: Shape, axes: list[Axis]) -> Side:
    axes = axes[::-1]
    return Side(start, tuple(a.dim for a in axes), tuple(a.step for a in axes))


Box = tuple[Shape, Shape]  # (origin, sizes) in grid coordinates


def clip(sizes: Shape, steps: Shape, start: int, lo: int, hi: int) -> Iterator[Box]:
    """The grid boxes whose value `start + sum(g_i * step_i)` lies in [lo, hi).

    A step of 0 means that the axis does not matter. Steps are positive and nested like the digits of a number, so
    at most two positions per axis are cut and everything between them stays one box.
    """
    if 0 in sizes:
        return
    span = sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if start >= lo and start + span < hi:
        yield (0,) * len(sizes), sizes
        return
    order = sorted((i for i, s in enumerate(steps) if s and sizes[i] > 1), key=lambda i: -steps[i])
    yield from _clip(sizes, steps, start, lo, hi, order, (0,) * len(sizes))


def _clip(sizes: Shape, steps: Shape, start: int, lo: int, hi: int, order: list[int], origin: Shape) -> Iterator[Box]:
    inner = sum((sizes[i] - 1) * steps[i] for i in order[1:])
    if not order:
        if lo <= start < hi:
            yield origin, sizes
        return
    axis, rest = order[0], order[1:]
    n, step = sizes[axis], steps[axis]
    first = max(0, -((start + inner - lo) // step))  # first position that reaches lo
    last = min(n - 1, (hi - 1 - start) // step)  # last position that starts below hi
    full_first = max(first, -((start - lo) // step))
    full_last = min(last, (hi - 1 - inner - start) // step)
    if full_first <= full_last:
        yield _at(origin, axis, full_first), _at(sizes, axis, full_last - full_first + 1)
        cut = [*range(first, full_first), *range(full_last + 1, last + 1)]
    else:
        cut = list(range(first, last + 1))
    for i in cut:
        yield from _clip(_at(sizes, axis, 1), steps, start + i * step, lo, hi, rest, _at(origin, axis, i))


def _at(values: Shape, index: int, value: int) -> Shape:
    return (*values[:index], value, *values[index + 1 :])


def clip_block(block: Block, end: str, offset: Shape, sizes: Shape) -> Iterator[Block]:
    """The parts of `block` whose `end` ("source" or "target") lies in the tensor box at `offset` of `sizes`."""
    blocks = [block]
    for dim, (lo, n) in enumerate(zip(offset, sizes, strict=True)):
        cut: list[Block] = []
        for b in blocks:
            side: Side = getattr(b, end)
            steps = tuple(s if d == dim else 0 for d, s in zip(side.dims, side.steps, strict=True))
            for origin, box in clip(b.sizes, steps, side.start[dim], lo, lo + n):
                cut.append(b if box == b.sizes else b.narrow(origin, box))
        blocks = cut
    yield from blocks
