"""Values of tensors that are stored as codes and scales, box by box in little memory.

A box is cut until its codes and the scales that it needs fit a strip; a strip is read with two strided reads, one of
codes and one of scales, and becomes float32 products. What is asked for may lie in any order: a transposed target only
means that the strips are narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_convert.containers.base import Encoded, StoredTensor
from mtp_convert.encodings.minifloat import Floats, bfloat16
from mtp_convert.encodings.scheme import Grid, Index, read_scales
from mtp_convert.mapping.views import Box, Shape, Side

if TYPE_CHECKING:
    from mtp_convert.engine.gather import Reader

STRIP = 1 << 18  # values at a time: enough that numpy's calls cost little, few enough for the cache


class Walk(NamedTuple):
    """Some axes of a box along one coordinate: first position, and size and step of every axis."""

    start: int
    sizes: Shape
    steps: Shape

    @property
    def span(self) -> int:
        """Positions from the first to the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.steps, strict=True))

    def positions(self) -> Index:
        """Every position, in row-major order of the axes."""
        at = np.full(1, self.start, dtype=np.int64)
        for n, s in zip(self.sizes, self.steps, strict=True):
            at = (at[:, None] + np.arange(n, dtype=np.int64) * s).reshape(-1)
        return at


def walks(shape: Shape, side: Side, sizes: Shape) -> tuple[Walk, Walk]:
    """How a box walks over the rows (all dimensions but the last, flattened) and over the columns of a tensor."""
    last = len(shape) - 1
    strides = [prod(shape[d + 1 : last]) for d in range(last)]
    over_rows = [(n, s * strides[d]) for n, d, s in zip(sizes, side.dims, side.steps, strict=True) if d != last]
    over_cols = [(n, s) for n, d, s in zip(sizes, side.dims, side.steps, strict=True) if d == last]
    row = sum(s * t for s, t in zip(side.start[:last], strides, strict=True))
    return (
        Walk(row, tuple(n for n, _ in over_rows), tuple(s for _, s in over_rows)),
        Walk(side.start[last], tuple(n for n, _ in over_cols), tuple(s for _, s in over_cols)),
    )


def strips(tensor: StoredTensor, side: Side, sizes: Shape) -> Iterator[Box]:
    """Cut a box until a part's codes and scales fit a strip; the axis that reaches furthest is halved."""
    shape, grid = tensor.shape, _encoding(tensor).scheme.grid(tensor.shape)
    todo: list[Box] = [((0,) * len(sizes), sizes)]
    while todo:
        origin, part = todo.pop()
        rows, cols = walks(shape, side.moved(origin), part)
        scales = (rows.span // grid.height + 2) * (cols.span // grid.width + 2)
        if prod(part) <= 1 or (prod(rows.sizes) * cols.span <= STRIP and scales <= 2 * STRIP):
            yield origin, part
            continue
        last = len(shape) - 1
        reach = [(n > 1, d != last, s * n) for n, d, s in zip(part, side.dims, side.steps, strict=True)]
        i = max(range(len(part)), key=reach.__getitem__)
        half = part[i] // 2
        moved = (*origin[:i], origin[i] + half, *origin[i + 1 :])
        todo.append((moved, (*part[:i], part[i] - half, *part[i + 1 :])))
        todo.append((origin, (*part[:i], half, *part[i + 1 :])))


def decode(reader: Reader, tensor: StoredTensor, side: Side, sizes: Shape) -> Floats:
    """The float32 products of one strip, as an array of shape `sizes` (not contiguous where the axes are permuted)."""
    encoded = _encoding(tensor)
    rows, cols = walks(tensor.shape, side, sizes)
    values = _codes(reader, tensor, encoded, rows, cols)
    _multiply(reader, encoded, encoded.scheme.grid(tensor.shape), values, rows=rows, cols=cols)
    encoded.scheme.apply_whole(values, whole_scale(reader, encoded))
    strides = []
    along_rows = iter(_row_major(rows.sizes, values.strides[0]))
    for d, s in zip(side.dims, side.steps, strict=True):
        strides.append(values.strides[1] * s if d == len(tensor.shape) - 1 else next(along_rows))
    return np.lib.stride_tricks.as_strided(values, sizes, strides)


def _encoding(tensor: StoredTensor) -> Encoded:
    assert tensor.encoding is not None
    return tensor.encoding


def _codes(reader: Reader, tensor: StoredTensor, encoded: Encoded, rows: Walk, cols: Walk) -> Floats:
    """Values without scales, [rows, columns from the first to the last]."""
    per_byte = encoded.scheme.per_byte
    width = tensor.shape[-1] // per_byte
    first, end = cols.start // per_byte, (cols.start + cols.span - 1) // per_byte + 1
    (chunk,) = encoded.codes.chunks
    base = chunk.start + rows.start * width + first
    raw = reader.dense(chunk.path, base, (*rows.sizes, end - first), (*(s * width for s in rows.steps), 1), 1)
    values = encoded.scheme.decode(raw.reshape(-1, end - first))
    skip = cols.start - first * per_byte
    return values[:, skip : skip + cols.span]


def _multiply(reader: Reader, encoded: Encoded, grid: Grid, values: Floats, *, rows: Walk, cols: Walk) -> None:
    """Bring in the scales of the blocks, in place."""
    if encoded.scales is None:
        return
    at = grid.block_rows(rows.positions())
    low, left = int(at.min()), cols.start // grid.width
    right = (cols.start + cols.span - 1) // grid.width + 1
    scales = block_scales(reader, encoded.scales, grid, (low, int(at.max()) + 1), (left, right))[at - low]
    if right - left > 1:
        skip = cols.start - left * grid.width
        scales = np.repeat(scales, grid.width, axis=1)[:, skip : skip + cols.span]
    with np.errstate(all="ignore"):  # a product may be too large or too small; NaN codes stay NaN
        values *= scales


def block_scales(
    reader: Reader, scales: StoredTensor, grid: Grid, rows: tuple[int, int], cols: tuple[int, int]
) -> Floats:
    """Stored scales of the blocks [rows) x [cols) as float32."""
    n, width = scales.dtype.itemsize, grid.shape[1]
    (chunk,) = scales.chunks
    sizes = (rows[1] - rows[0], cols[1] - cols[0])
    raw = reader.dense(chunk.path, chunk.start + (rows[0] * width + cols[0]) * n, sizes, (width * n, n), n)
    return read_scales(raw, scales.dtype).reshape(sizes)


def whole_scale(reader: Reader, encoded: Encoded) -> np.float32 | None:
    """The scale of the whole tensor, where there is one."""
    if encoded.whole is None:
        return None
    (chunk,) = encoded.whole.chunks
    raw = reader.dense(chunk.path, chunk.start, (1,), (encoded.whole.dtype.itemsize,), encoded.whole.dtype.itemsize)
    return np.float32(read_scales(raw, encoded.whole.dtype)[0])


def rounded(values: Floats, to: str) -> npt.NDArray[Any]:
    """Float32 as another torch type, each value rounded once; bfloat16 as its bits."""
    if to == "bfloat16":
        return bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(to, copy=False)


def _row_major(sizes: Shape, itemsize: int) -> Shape:
    strides: list[int] = []
    step = itemsize
    for n in reversed(sizes):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
