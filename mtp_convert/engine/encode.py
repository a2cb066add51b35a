"""Writes a tensor as codes and scales, strip by strip, so that any window of either can be produced on its own.

A strip is a run of whole blocks. Its values are gathered from the source; codes and scales follow from them and from
the scales that the tensor had before, if it had any. Codes and scales lie in different places of a file, so a strip is
coded for both; where every block keeps its scale this is remembered, and the scales are then copied. Blocks larger
than a strip (one scale per tensor) are measured once, in parts, before the first code is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TypeVar

import numpy as np

from mtp_convert.containers.base import Encoded, StoredTensor
from mtp_convert.encodings.cast import cast
from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.encodings.fit import PART, Block, Coded, Infinite, Rule, fit
from mtp_convert.encodings.minifloat import Floats, from_bfloat16
from mtp_convert.encodings.scheme import Grid, Strip, scale_bytes
from mtp_convert.engine.coded import block_scales, whole_scale
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.plan import Step

STRIP = 1 << 20  # values that are gathered at a time
Range = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Coder:
    """One target tensor and how it is written; `encoded` names types and shapes, and holds the scales it had before.

    step, tensors, dtype: where the values come from, and in which type. What is remembered between windows saves work
    and changes nothing: every byte follows from the values and the scales before.
    """

    step: Step
    tensors: Mapping[str, StoredTensor]
    dtype: DType
    encoded: Encoded
    _unchanged: list[int] = field(default_factory=lambda: [0], init=False, repr=False)  # one bit per strip
    _large: dict[int, Floats] = field(default_factory=dict, init=False, repr=False)
    _whole: list[np.float32] = field(default_factory=list, init=False, repr=False)
    _measuring: Lock = field(default_factory=Lock, init=False, repr=False)  # one thread measures, the others wait

    def codes(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Write bytes [lo, hi) of the codes into `out`."""
        per_byte = self.encoded.scheme.per_byte
        width = self.grid.cols // per_byte
        rows = lo // width, (hi - 1) // width + 1
        first, last = self.grid.block_rows(np.array([rows[0], rows[1] - 1]))
        for strip in self.grid.strips(int(first), int(last) + 1, STRIP):
            if not self.is_large:
                at = strip.rows[0], strip.cols[0] // per_byte
                _place(self.coded(reader, strip).codes, out, at, width, lo)
                continue
            inside = max(rows[0], strip.rows[0]), min(rows[1], strip.rows[1])
            for part_rows, part_cols in _parts(inside, strip.cols):
                codes = self._large_codes(reader, strip, part_rows, part_cols)
                _place(codes, out, (part_rows[0], part_cols[0] // per_byte), width, lo)

    def scales(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Write bytes [lo, hi) of the scales of the blocks into `out`."""
        stored = _present(self.encoded.scales)
        n = stored.dtype.itemsize
        width = self.grid.shape[1] * n
        for strip in self.grid.strips(lo // width, (hi - 1) // width + 1, STRIP):
            scales = self._kept(reader, strip) if self._unchanged[0] >> strip.number & 1 else None
            if scales is None:
                scales = self._large_scale(reader, strip) if self.is_large else self.coded(reader, strip).scales
            raw = scale_bytes(scales, stored.dtype).reshape(len(scales), -1)
            _place(raw, out, (strip.block_rows[0], strip.block_cols[0] * n), width, lo)

    def whole(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Write bytes [lo, hi) of the scale of the whole tensor into `out`."""
        value = np.full(1, _present(self._whole_scale(reader)), dtype=np.float32)
        out[:] = scale_bytes(value, _present(self.encoded.whole).dtype)[lo:hi]

    def coded(self, reader: Reader, strip: Strip) -> Coded:
        """Codes and scales of a strip.

        Raises:
            ConvertError: MTP028 for infinities.
        """
        values = self.values(reader, strip.rows, strip.cols)
        try:
            found = fit(values, self._rule(reader), self.grid, self._kept(reader, strip))
        except Infinite as error:
            raise self._infinite() from error
        if found.kept:
            self._unchanged[0] |= 1 << strip.number  # two threads at once may lose a bit, which costs time alone
        return found

    def values(self, reader: Reader, rows: Range, cols: Range) -> Floats:
        """Values [rows, columns]; rows count through all matrices of a stack."""
        *stack, height, _ = self.step.shape
        found = np.empty((rows[1] - rows[0], cols[1] - cols[0]), dtype=np.float32)
        row = rows[0]
        while row < rows[1]:
            matrix, top = divmod(row, height)
            n = min(height - top, rows[1] - row)
            index = tuple(int(i) for i in np.unravel_index(matrix, stack)) if stack else ()
            sizes = (*(1,) * len(stack), n, cols[1] - cols[0])
            extent = TensorExtent(self.step, self.tensors, self.dtype, (*index, top, cols[0]), sizes)
            raw: Bytes = np.empty(extent.nbytes, dtype=np.uint8)
            extent.fill(reader, raw, 0, extent.nbytes)
            found[row - rows[0] : row - rows[0] + n] = _float32(raw, self.dtype).reshape(n, -1)
            row += n
        return found

    @cached_property
    def grid(self) -> Grid:
        """The blocks of the tensor."""
        return self.encoded.scheme.grid(self.step.shape)

    @cached_property
    def is_large(self) -> bool:
        """Whether one block is more than a strip (without scales it is all of the tensor)."""
        return self.grid.height * self.grid.width > STRIP or not self.encoded.scheme.scaled

    def _rule(self, reader: Reader) -> Rule:
        scales = self.encoded.scales or self.encoded.codes
        return Rule(self.encoded.scheme, self.dtype, scales.dtype, self._whole_scale(reader))

    def _kept(self, reader: Reader, strip: Strip) -> Floats | None:
        """The scales that a strip had before, where they are known."""
        scales = self.encoded.scales
        if not self.encoded.scheme.scaled:
            return np.ones((1, 1), dtype=np.float32)
        if scales is None or not scales.chunks:
            return None
        return block_scales(reader, scales, self.grid, strip.block_rows, strip.block_cols)

    def _whole_scale(self, reader: Reader) -> np.float32 | None:
        """The scale of the whole tensor: the one from before while it leaves a scale for every block."""
        if self.encoded.whole is None:
            return None
        with self._measuring:
            if not self._whole:
                self._whole.append(self._measured_whole(reader))
        return self._whole[0]

    def _measured_whole(self, reader: Reader) -> np.float32:
        largest = np.float32(0)
        for rows, cols in _parts((0, self.grid.rows), (0, self.grid.cols)):
            largest = np.fmax(largest, np.fmax.reduce(np.abs(self.values(reader, rows, cols)), axis=None))
        before = whole_scale(reader, self.encoded) if _present(self.encoded.whole).chunks else None
        keep = before is not None and self.encoded.scheme.whole_fits(largest, before)
        return _present(before) if keep else self.encoded.scheme.fitting_whole(largest)

    def _large_scale(self, reader: Reader, strip: Strip) -> Floats:
        """The scale [1, 1] of a large block."""
        rule, kept = self._rule(reader), self._kept(reader, strip)
        with self._measuring:
            if strip.number not in self._large:
                block = Block(rule, kept)
                for rows, cols in _parts(strip.rows, strip.cols) if self.encoded.scheme.scaled else ():
                    block.add(self.values(reader, rows, cols))
                try:
                    self._large[strip.number] = block.scale()
                except Infinite as error:
                    raise self._infinite() from error
        return self._large[strip.number]

    def _large_codes(self, reader: Reader, strip: Strip, rows: Range, cols: Range) -> Bytes:
        """The codes of a part of a large block."""
        values = self.values(reader, rows, cols)
        codes = self._rule(reader).codes(values[None, :, None, :], self._large_scale(reader, strip))
        return self.encoded.scheme.pack(codes.reshape(values.shape))

    def _infinite(self) -> ConvertError:
        problem = Problem(f"{self.step.tensor} holds infinities, which {self.encoded.scheme.kind} cannot hold")
        return ConvertError("MTP028", problem, hint="look at the weights; --encoding bf16 writes them as they are")


@dataclass(frozen=True, slots=True)
class CodedExtent:
    """One raw tensor of a coder: its `codes`, its `scales`, or the scale of the `whole` tensor."""

    coder: Coder
    role: str

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        raw: StoredTensor = getattr(self.coder.encoded, self.role)
        return raw.nbytes

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Write bytes [lo, hi) into `out`."""
        if lo < hi:
            getattr(self.coder, self.role)(reader, out, lo, hi)


def _parts(rows: Range, cols: Range) -> Iterator[tuple[Range, Range]]:
    """A box in parts that are small enough to be coded at once, row by row where rows are short."""
    across = min(PART, cols[1] - cols[0])
    down = max(1, PART // across)
    for top in range(*rows, down):
        for left in range(*cols, across):
            yield (top, min(top + down, rows[1])), (left, min(left + across, cols[1]))


def _place(part: Bytes, out: Bytes, at: tuple[int, int], width: int, lo: int) -> None:
    """Copy what a window holds of `part`, a box of bytes at row and byte `at` of rows of `width` bytes.

    `out` is the window; its first byte is byte `lo` of all rows.
    """
    row, left = at
    n = part.shape[1]
    hi = lo + len(out)
    first = max(row, -(-(lo - left) // width))  # rows that lie inside with all their bytes
    last = min(row + len(part), (hi - left - n) // width + 1)
    if first < last:
        start = first * width + left - lo
        inside = np.ndarray((last - first, n), np.uint8, out.data, start, (width, 1))
        inside[...] = part[first - row : last - row]
    for cut in {first - 1, max(last, first)} & set(range(row, row + len(part))):
        begin = cut * width + left
        a, b = max(begin, lo), min(begin + n, hi)
        if a < b:
            out[a - lo : b - lo] = part[cut - row, a - begin : b - begin]


def _float32(raw: Bytes, dtype: DType) -> Floats:
    if dtype.name == "BF16":
        return from_bfloat16(raw.view(np.uint16))
    if dtype.name == "F16":
        return raw.view(np.float16).astype(np.float32)
    return cast(raw, dtype, BY_NAME["F32"].torch_name).view(np.float32)


def _present(value: T | None) -> T:
    assert value is not None
    return value
