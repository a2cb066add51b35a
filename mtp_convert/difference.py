"""Tensor-level difference of two checkpoints of one family, in any two layouts: compared param by param."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.engine.compare import compare
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.layout import Binding, Layout, Part
from mtp_convert.mapping.plan import Step, make_plan
from mtp_convert.mapping.rules import Param
from mtp_convert.mapping.views import whole
from mtp_convert.shifts import dtype_after


@dataclass(frozen=True)
class ParamDifference:
    """One param that differs: its names on both sides and by how much."""

    param: str
    a: str
    b: str
    text: str
    max_abs: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class CheckpointDifference:
    """All params compared."""

    a: str
    b: str
    params: int
    only_a: list[str]
    only_b: list[str]
    dtypes: list[str]
    differing: list[ParamDifference]

    @property
    def equal(self) -> bool:
        """Same params, same values."""
        return not (self.only_a or self.only_b or self.differing)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        rows = [d.__dict__ for d in self.differing]
        return {"schema_version": 1, "equal": self.equal, **self.__dict__, "differing": rows}


def diff(a: Checkpoint, b: Checkpoint, *, progress: Progress | None = None) -> CheckpointDifference:
    """Compare two checkpoints.

    Raises:
        ConvertError: MTP028 when they are of different families.
    """
    if a.family.name != b.family.name:
        raise ConvertError("MTP028", Problem("two families", got=f"{a.family.name} and {b.family.name}"))
    left, right = _params(a), _params(b)
    both = [n for n in left if n in right]
    differing, dtypes = [], []
    reader = Reader()
    try:
        for name in both:
            x, y = _alike(left[name], right[name])
            if x.dtype != y.dtype:
                dtypes.append(f"{name}: {x.dtype} and {y.dtype}")
            if (d := compare(x, y, reader, progress=progress)) is not None:
                origin = x.step.sources[0], y.step.sources[0]
                differing.append(ParamDifference(name, *origin, d.text(), d.max_abs, d.norms))
    finally:
        reader.close()
    return CheckpointDifference(
        str(a.located.given),
        str(b.located.given),
        len(both),
        [n for n in left if n not in right],
        [n for n in right if n not in left],
        dtypes,
        differing,
    )


def _alike(x: TensorExtent, y: TensorExtent) -> tuple[TensorExtent, TensorExtent]:
    """Codes have no element type of their own: they are compared in the other side's, or as exact products."""
    coded_x, coded_y = _is_coded(x), _is_coded(y)
    if coded_x and coded_y:
        return replace(x, dtype=BY_NAME["F32"]), replace(y, dtype=BY_NAME["F32"])
    if coded_x:
        return replace(x, dtype=y.dtype), y
    return (x, replace(y, dtype=x.dtype)) if coded_y else (x, y)


def _is_coded(extent: TensorExtent) -> bool:
    return extent.tensors[extent.step.sources[0]].encoding is not None


def _params(c: Checkpoint) -> dict[str, TensorExtent]:
    """Every param of a checkpoint as bytes in its own shape."""
    steps = make_plan(c.layout, param_layout(c.layout)).steps
    return {s.tensor: _extent(c, s) for s in steps}


def _extent(c: Checkpoint, step: Step) -> TensorExtent:
    dtype: DType = c.tensor(step.sources[0]).dtype
    if step.shift:
        dtype = dtype_after([dtype])
    return TensorExtent(step, c.stored.tensors, dtype, (0,) * len(step.shape), step.shape)


def param_layout(layout: Layout) -> Layout:
    """The layout whose tensors are the params themselves."""

    def own(p: Param) -> Binding:
        return Binding(p.name, p.shape, (Part(p.name, whole(p.shape)),), 0, p.vocab, p.high_precision)

    bindings = {p.name: own(p) for p in layout.params.values()}
    home = {n: (b, b.parts[0].view) for n, b in bindings.items()}
    return Layout("params", {}, layout.params, bindings, (), {}, home)
