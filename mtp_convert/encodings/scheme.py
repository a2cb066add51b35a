"""A scheme: how the values of a matrix are stored as small codes and scales. Arithmetic on shapes and values, no files.

    value[r, c] = code[r, c] * scale[block of r, block of c]      times or over one more scale of the whole tensor

A tensor with more than two dimensions is a stack of matrices, each with blocks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_convert.encodings.dtype import DType
from mtp_convert.encodings.minifloat import (
    E2M1,
    E4M3,
    POWERS,
    Bytes,
    Floats,
    MiniFloat,
    bfloat16,
    ceil_power,
    from_bfloat16,
    pack,
    power_codes,
    unpack_values,
)

Shape = tuple[int, ...]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of storing values.

    codes: one e4m3 code per byte, or two e2m1 codes per byte. block: rows and columns that share a scale; 0 is all of
    them. powers: scales are powers of two, whatever type they are stored in. chunks: equal runs of rows, in each of
    which blocks start anew; 0 is one run over a whole stack. whole: how the scale of the whole tensor enters: "times",
    "over", or "" without one. scaled: whether there are scales at all.
    """

    codes: MiniFloat
    block: tuple[int, int]
    powers: bool = False
    chunks: int = 1
    whole: str = ""
    scaled: bool = True

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 1 if self.codes is E4M3 else 2

    @property
    def kind(self) -> str:
        """The name of the scheme for people."""
        rows, cols = self.block
        if self.codes is E2M1:
            return "nvfp4" if self.whole else "mxfp4"
        if not self.scaled:
            return "fp8"
        if not rows:
            return "fp8 per tensor"
        if not cols:
            return "fp8 per row"
        return f"fp8 {rows}x{cols} ue8m0" if self.powers else f"fp8 {rows}x{cols}"

    def grid(self, shape: Shape) -> Grid:
        """The blocks of a tensor of decoded `shape`."""
        *stack, height, cols = shape
        rows = prod(stack) * height
        period = max(height // self.chunks if self.chunks else rows, 1)
        return Grid(rows, cols, period, self.block[0] or period, self.block[1] or max(cols, 1))

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of the codes as they are stored."""
        return (*shape[:-1], shape[-1] // self.per_byte)

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scales of a tensor of decoded `shape`: one per block, a stack of matrices like the codes."""
        rows, cols = self.grid(shape).shape
        return (*shape[:-2], rows // max(prod(shape[:-2]), 1), cols)

    def decode(self, raw: Bytes) -> Floats:
        """[rows, bytes] to [rows, values]; a new array."""
        if self.codes is E4M3:
            return np.take(E4M3.table, raw, mode="clip")
        return unpack_values(raw)

    def pack(self, codes: Bytes) -> Bytes:
        """[..., values] codes to [..., bytes]."""
        return codes if self.per_byte == 1 else pack(codes)

    def joined(self, scales: Floats, whole: np.float32) -> Floats:
        """Block scales together with the scale of the whole tensor."""
        return scales * whole if self.whole == "times" else scales / whole

    def parted(self, scales: Floats, whole: np.float32) -> Floats:
        """Block scales without the scale of the whole tensor."""
        return scales / whole if self.whole == "times" else scales * whole

    def apply_whole(self, values: Floats, whole: np.float32 | None) -> None:
        """Bring in the scale of the whole tensor, in place. Code times block scale is exact, so this rounds once."""
        with np.errstate(all="ignore"):
            if whole is not None and self.whole == "times":
                values *= whole
            elif whole is not None:
                values /= whole

    def fitting(self, largest: Floats, dtype: DType, whole: np.float32 | None = None) -> Floats:
        """The scales of blocks with these largest magnitudes, as values that `dtype` holds; 1 for a block of zeros."""
        top = np.float32(self.codes.largest)
        with np.errstate(all="ignore"):
            if self.powers:
                return ceil_power(largest, self.codes.largest)
            scales = largest / top
            if whole is not None:
                scales = self.parted(scales, whole)
            if dtype.name == "F8_E4M3":
                scales = np.maximum(scales, E4M3.table[1])  # 0 would lose the block
            return read_scales(scale_bytes(np.where(largest == 0, np.float32(1), scales), dtype), dtype)

    def whole_fits(self, largest: np.float32, whole: np.float32) -> bool:
        """Whether a block scale exists for the largest magnitude of a tensor under this scale of the whole tensor."""
        with np.errstate(all="ignore"):
            needed = self.parted(np.full(1, largest / np.float32(self.codes.largest)), whole)
        return bool(needed[0] < np.float32(E4M3.largest * 29 / 28))  # halfway to the code that does not exist

    def fitting_whole(self, largest: np.float32) -> np.float32:
        """The scale of the whole tensor that uses all of the block scales' range."""
        reach = np.float32(self.codes.largest * E4M3.largest)
        if not largest:
            return np.float32(1)
        return np.float32(largest / reach) if self.whole == "times" else np.float32(reach / largest)


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of one matrix: `rows` x `cols` values, blocks of `height` x `width` that start anew after `period`."""

    rows: int
    cols: int
    period: int
    height: int
    width: int

    @property
    def per_period(self) -> int:
        """Block rows of one period; the last one may be partial."""
        return -(-self.period // self.height)

    @property
    def shape(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.rows // self.period * self.per_period, -(-self.cols // self.width)

    def block_rows(self, rows: Index) -> Index:
        """The block row of every row."""
        return rows // self.period * self.per_period + rows % self.period // self.height

    def strips(self, first: int, last: int, most: int) -> Iterator[Strip]:
        """Runs of whole blocks of at most `most` values (or one block) that together hold block rows [first, last).

        Where they begin depends on nothing but the grid, so that every window of a tensor sees the same ones.
        """
        height, width = min(self.height, self.period), min(self.width, self.cols)
        across = min(self.shape[1], max(1, most // (height * width)))
        down = max(1, most // (height * self.cols)) if across == self.shape[1] else 1
        per_row, per_period = -(-self.shape[1] // across), -(-self.per_period // down)
        at = first
        while at < last:
            period = at // self.per_period
            start = (at % self.per_period) // down * down
            stop = min(start + down, self.per_period)
            rows = period * self.period + start * self.height, period * self.period + min(stop * height, self.period)
            at = period * self.per_period + stop
            number = (period * per_period + start // down) * per_row
            for i, left in enumerate(range(0, self.shape[1], across)):
                right = min(left + across, self.shape[1])
                cols = left * self.width, min(right * self.width, self.cols)
                yield Strip(number + i, (period * self.per_period + start, at), (left, right), rows, cols)


class Strip(NamedTuple):
    """Its number, block rows and columns from-to, and the rows and columns of their values."""

    number: int
    block_rows: tuple[int, int]
    block_cols: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]


def read_scales(raw: Bytes, dtype: DType) -> Floats:
    """Stored scales as float32.

    Raises:
        ValueError: a type that no scale has.
    """
    if dtype.name == "F32":
        return raw.view(np.float32)
    if dtype.name == "BF16":
        return from_bfloat16(raw.view(np.uint16))
    if dtype.name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype.name in ("F8_E8M0", "U8"):
        return POWERS[raw]
    if dtype.name == "F8_E4M3":
        return E4M3.table[raw]
    raise ValueError(f"scales of type {dtype}")


def scale_bytes(scales: Floats, dtype: DType) -> Bytes:
    """Scales as they are stored: the inverse of `read_scales` on values that the type holds, else the nearest."""
    flat = np.ascontiguousarray(scales)
    if dtype.name == "F32":
        return flat.view(np.uint8)
    if dtype.name == "BF16":
        return bfloat16(flat).view(np.uint8)
    if dtype.name == "F16":
        return flat.astype(np.float16).view(np.uint8)
    return power_codes(flat) if dtype.name in ("F8_E8M0", "U8") else E4M3.codes(flat)
