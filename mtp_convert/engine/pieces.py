"""From a plan's coordinates to byte positions: the copies that fill one chunk of a target tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mtp_convert.containers.base import Place, StoredChunk, StoredTensor
from mtp_convert.containers.torch_zip import contiguous
from mtp_convert.encodings.dtype import DType
from mtp_convert.mapping.plan import Step
from mtp_convert.mapping.views import Block, Shape, Side, clip_block


class Piece(NamedTuple):
    """A strided box: element g = (g_0, g_1, ...) goes from `base + dot(g, source)` to `start + dot(g, target)`.

    `base` and `source` are in bytes of `path`, `start` and `target` in elements of the target chunk.
    """

    sizes: Shape
    path: Place
    base: int
    source: Shape
    start: int
    target: Shape
    dtype: DType


class CodedPiece(NamedTuple):
    """The same from a tensor whose bytes are codes: `source` is in coordinates of its values."""

    sizes: Shape
    tensor: StoredTensor
    source: Side
    start: int
    target: Shape


def pieces_of(
    step: Step, tensors: Mapping[str, StoredTensor], *, offset: Shape, sizes: Shape
) -> Iterator[Piece | CodedPiece]:
    """Every copy into the target chunk at `offset` of `sizes` (row-major, contiguous)."""
    strides = contiguous(sizes)
    for origin in step.origins(offset, sizes):
        for block in clip_block(origin.block, "target", offset, sizes):
            start, target = _linear(block.target, offset, strides)
            for name in origin.tensors:
                tensor = tensors[name]
                if tensor.encoding is not None:
                    yield CodedPiece(block.sizes, tensor, block.source, start, target)
                    continue
                lo, hi = _rows(block.source, block.sizes)
                for chunk in tensor.chunks_in_rows(lo, hi):
                    yield from _from_chunk(block, chunk, tensor.dtype, offset, strides, start, target)


def _from_chunk(
    block: Block,
    chunk: StoredChunk,
    dtype: DType,
    offset: Shape,
    strides: Shape,
    start: int,
    target: Shape,
) -> Iterator[Piece]:
    source_strides = contiguous(chunk.sizes)
    for part in clip_block(block, "source", chunk.offset, chunk.sizes):
        at, source = _linear(part.source, chunk.offset, source_strides)
        if part is not block:
            start, target = _linear(part.target, offset, strides)
        n = dtype.itemsize
        yield Piece(
            part.sizes,
            chunk.path,
            chunk.start + at * n,
            tuple(s * n for s in source),
            start,
            target,
            dtype,
        )


def _linear(side: Side, offset: Shape, strides: Shape) -> tuple[int, Shape]:
    """Element position of the first element inside a chunk, and the element stride of every axis."""
    start = sum((s - o) * t for s, o, t in zip(side.start, offset, strides, strict=True))
    return start, tuple(step * strides[d] for d, step in zip(side.dims, side.steps, strict=True))


def _rows(side: Side, sizes: Shape) -> tuple[int, int]:
    """The range of dimension 0 that a block touches."""
    if not side.start:
        return 0, 1
    lo = side.start[0]
    span = sum((n - 1) * s for n, d, s in zip(sizes, side.dims, side.steps, strict=True) if d == 0)
    return lo, lo + span + 1
