"""Params that a target stores only as another one: the source may have them apart, if they hold the same numbers."""

from __future__ import annotations

from dataclasses import replace

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.engine.compare import compare
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.layout import Binding, Layout, Part
from mtp_convert.mapping.plan import Alias, Step, same_param
from mtp_convert.mapping.views import whole


def check_tied(source: Checkpoint, target: Layout, alias: Alias) -> None:
    """Refuse to leave numbers behind that the target has no tensor for.

    Args:
        alias: the source params that make a target param.

    Raises:
        ConvertError: MTP028, with the size of every difference.
    """
    problems = []
    reader = Reader()
    try:
        for param, to in target.tied.items():
            for own in alias(param):
                if (found := _difference(source, own, to, reader)) is not None:
                    problems.append(found)
    finally:
        reader.close()
    if problems:
        hint = f"the {target.name} layout of {source.family.name} stores one tensor for both"
        raise ConvertError("MTP028", problems, hint=hint)


def _difference(source: Checkpoint, param: str, other: str, reader: Reader) -> Problem | None:
    """What is wrong with storing one of two params of the source only."""
    if source.layout.home[param] == source.layout.home[other]:
        return None
    a, b = _extent(source, param), _extent(source, other)
    if a.dtype != b.dtype:
        a, b = (replace(x, dtype=BY_NAME["F32"]) for x in (a, b))
    if (d := compare(a, b, reader)) is None:
        return None
    return Problem(f"{a.step.sources[0]} is not {b.step.sources[0]}: {d.text()}")


def _extent(source: Checkpoint, param: str) -> TensorExtent:
    """The bytes of a param in its own shape."""
    shape = source.layout.params[param].shape
    step = Step(Binding(param, shape, (Part(param, whole(shape)),)), shape, source.layout, same_param)
    dtype = source.tensor(step.sources[0]).dtype
    return TensorExtent(step, source.stored.tensors, dtype, (0,) * len(shape), shape)
