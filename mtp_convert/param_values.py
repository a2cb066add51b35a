"""The params of a checkpoint as numbers: extents to compare byte by byte, and arrays to test hypotheses on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.encodings.minifloat import E4M3
from mtp_convert.engine.compare import ELEMENTS
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.engine.measure import float64, numbers
from mtp_convert.hypotheses.agreement import Both, Rounding, Values
from mtp_convert.hypotheses.explain import Sample
from mtp_convert.mapping.layout import Binding, Layout, Part
from mtp_convert.mapping.plan import Step, make_plan, same_param
from mtp_convert.mapping.views import Shape, whole
from mtp_convert.shifts import dtype_after

MOST_WHOLE = 1 << 22  # elements; of a larger param this many are looked at twice, as rows and as columns
ALIGNED = 128  # sampled rows and columns begin at a multiple, where the blocks of scales do
ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3}
CODED = {True: Rounding(2.0**-4, 2.0**-18), False: Rounding(2.0**-4, 1 / 6)}  # e4m3, e2m1: half of their largest steps


def params(c: Checkpoint) -> dict[str, TensorExtent]:
    """Every param of a checkpoint as bytes in its own shape."""
    steps = make_plan(c.layout, param_layout(c.layout)).steps
    return {s.tensor: _extent(c, s) for s in steps}


def copies(c: Checkpoint) -> Iterator[tuple[str, TensorExtent]]:
    """Every stored copy, as the param that it holds and its bytes."""
    own = param_layout(c.layout).bindings
    for tensor in sorted(c.copies):
        param = c.layout.copies[tensor]
        home = {param: (c.layout.copy_binding(tensor), c.layout.home[param][1])}
        layout = replace(c.layout, home=home)
        yield param, _extent(c, Step(own[param], own[param].shape, layout, same_param))


def _extent(c: Checkpoint, step: Step) -> TensorExtent:
    dtype: DType = c.tensor(step.sources[0]).dtype
    if step.shift:
        dtype = dtype_after([dtype])
    return TensorExtent(step, c.stored.tensors, dtype, (0,) * len(step.shape), step.shape)


def param_layout(layout: Layout) -> Layout:
    """The layout whose tensors are the params themselves."""

    def own(name: str, shape: Shape, vocab: bool, high_precision: bool) -> Binding:
        return Binding(name, shape, (Part(name, whole(shape)),), 0, vocab, high_precision)

    bindings = {p.name: own(p.name, p.shape, p.vocab, p.high_precision) for p in layout.params.values()}
    home = {n: (b, b.parts[0].view) for n, b in bindings.items()}
    return Layout("params", {}, layout.params, bindings, (), {}, home)


def alike(x: TensorExtent, y: TensorExtent) -> tuple[TensorExtent, TensorExtent]:
    """Codes have no element type of their own: they are compared in the other side's, or as exact products."""
    coded_x, coded_y = is_coded(x), is_coded(y)
    if coded_x and coded_y:
        return replace(x, dtype=BY_NAME["F32"]), replace(y, dtype=BY_NAME["F32"])
    if coded_x:
        return replace(x, dtype=y.dtype), y
    return (x, replace(y, dtype=x.dtype)) if coded_y else (x, y)


def is_coded(extent: TensorExtent) -> bool:
    """Whether the values are stored as codes."""
    return extent.tensors[extent.step.sources[0]].encoding is not None


def rounding(x: TensorExtent, y: TensorExtent) -> Rounding:
    """How far two params may be apart that were the same before both were stored."""
    a, b = _rounding(x), _rounding(y)
    return Rounding(a.relative + b.relative, a.to_largest + b.to_largest)


def _rounding(extent: TensorExtent) -> Rounding:
    stored = extent.tensors[extent.step.sources[0]]
    if stored.encoding is not None:
        return CODED[stored.encoding.scheme.codes is E4M3]
    return Rounding(ROUNDOFF.get(stored.dtype.name, 0.0))


def middle(extent: TensorExtent, reader: Reader, count: int) -> Values:
    """At most `count` values from the middle of a param, float64."""
    total = extent.nbytes // extent.dtype.itemsize
    n = min(count, total)
    return float64(_read(extent, reader, (total - n) // 2, n), extent.dtype)


def sample(x: TensorExtent, y: TensorExtent, reader: Reader, first: int) -> Sample:
    """The values of both sides: all of a small param, else rows and columns around the differing element `first`."""
    shape = _matrix(x.sizes)
    if prod(shape) <= MOST_WHOLE:
        a, b = (_values(_read(e, reader, 0, prod(shape)), e.dtype).reshape(shape) for e in (x, y))
        return Sample.whole(a, b)
    (rows, cols), (row, col) = shape, divmod(first, shape[1])
    some_rows = _run(row, rows, MOST_WHOLE // cols)
    some_cols = some_rows if rows == cols else _run(col, cols, MOST_WHOLE // rows)  # a transpose needs the same ones
    (a_rows, a_cols), (b_rows, b_cols) = (_strips(e, reader, some_rows, some_cols) for e in (x, y))
    return Sample((a_rows, b_rows), (a_cols, b_cols))


def _matrix(shape: Shape) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def columns(extents: Sequence[TensorExtent], reader: Reader) -> list[Values]:
    """The first columns of equally wide params, as many as all of them together may have in memory."""
    width = _matrix(extents[0].sizes)[1]
    most = max(8, MOST_WHOLE // sum(_matrix(e.sizes)[0] for e in extents))
    return [_strips(e, reader, slice(0, 1), slice(0, min(width, most)))[1] for e in extents]


def _run(at: int, of: int, most: int) -> slice:
    """At most `most` neighbours (2 at least), `at` among them."""
    n = max(2, most // ALIGNED * ALIGNED or most)
    start = max(0, min(at // ALIGNED * ALIGNED, (of - n) // ALIGNED * ALIGNED)) if n >= ALIGNED else max(0, at - n + 1)
    return slice(start, min(of, start + n))


def _strips(extent: TensorExtent, reader: Reader, some_rows: slice, some_cols: slice) -> Both:
    """Some whole rows and some whole columns, in one pass over the param."""
    rows, cols = _matrix(extent.sizes)
    height = max(1, ELEMENTS // cols)
    across: list[Values] = []
    down: list[Values] = []
    for at in range(0, rows, height):
        n = min(height, rows - at)
        values = _values(_read(extent, reader, at * cols, n * cols), extent.dtype).reshape(n, cols)
        down.append(values[:, some_cols].copy())
        lo, hi = max(at, some_rows.start), min(at + n, some_rows.stop)
        if lo < hi:
            across.append(values[lo - at : hi - at].copy())
    return np.concatenate(across), np.concatenate(down)


def _read(extent: TensorExtent, reader: Reader, at: int, n: int) -> Bytes:
    size = extent.dtype.itemsize
    out: Bytes = np.empty(n * size, dtype=np.uint8)
    extent.fill(reader, out, at * size, (at + n) * size)
    return out


def _values(raw: Bytes, dtype: DType) -> Values:
    """float32 where that holds every value, else float64."""
    found = numbers(raw, dtype)
    return found.astype(np.float32 if found.dtype in (np.float16, np.float32) else np.float64, copy=False)


def shapes(extents: Mapping[str, TensorExtent]) -> dict[Shape, list[str]]:
    """The names of equally shaped params."""
    found: dict[Shape, list[str]] = {}
    for name, extent in extents.items():
        found.setdefault(extent.sizes, []).append(name)
    return found
