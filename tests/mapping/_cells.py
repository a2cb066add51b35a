"""Walks views and blocks element by element: slow, obvious, and independent of the arithmetic under test."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mtp_convert.mapping.layout import Layout
from mtp_convert.mapping.plan import Step
from mtp_convert.mapping.views import Block, Shape, Side, View

Array = NDArray[np.int64]


def cells(view: View) -> list[Shape]:
    """The tensor coordinates of a param's elements, in the param's row-major order."""
    found = []
    for g in np.ndindex(*(a.size for a in view.axes)):
        at = list(view.start)
        for position, axis in zip(g, view.axes, strict=True):
            at[axis.dim] += position * axis.step
        found.append(tuple(at))
    return found


def _at(side: Side, g: Shape) -> Shape:
    at = list(side.start)
    for position, dim, step in zip(g, side.dims, side.steps, strict=True):
        at[dim] += position * step
    return tuple(at)


def copies(block: Block) -> Iterator[tuple[Shape, Shape]]:
    """(source coordinates, target coordinates) of every element of a block."""
    for g in np.ndindex(*block.sizes):
        yield _at(block.source, g), _at(block.target, g)


def numbered(layout: Layout) -> dict[str, Array]:
    """Every param of a layout as an array in which no number occurs twice."""
    arrays, first = {}, 1
    for name, param in layout.params.items():
        n = int(np.prod(param.shape))
        arrays[name] = np.arange(first, first + n).reshape(param.shape)
        first += n
    return arrays


def stored(layout: Layout, params: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of a layout that holds these params."""
    tensors = {}
    for name, binding in layout.bindings.items():
        tensor = np.zeros(binding.shape, dtype=np.int64)
        for part in binding.parts:
            for at, value in zip(cells(part.view), params[part.param].flat, strict=True):
                tensor[at] = value
        tensors[name] = tensor
    return tensors


def carried_out(step: Step, tensors: Mapping[str, Array]) -> Array:
    """The target tensor of a step, summed over the source tensors of every origin."""
    target = np.zeros(step.shape, dtype=np.int64)
    for origin in step.origins((0,) * len(step.shape), step.shape):
        for source, at in copies(origin.block):
            target[at] += sum(tensors[name][source] for name in origin.tensors)
    return target
