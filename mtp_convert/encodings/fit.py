"""Values to codes: a block keeps the scale it had if that gives its values back, else it gets a new one.

So weights that nobody changed come back as the same bytes, whatever rule made their scales, and a changed block is
coded as well as its format can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtp_convert.encodings.dtype import DType
from mtp_convert.encodings.minifloat import Bytes, Floats, bfloat16, from_bfloat16
from mtp_convert.encodings.scheme import Grid, Scheme

Mask = npt.NDArray[np.bool_]
PART = 1 << 17  # values that are coded at a time, so that the float32 work stays in the cache


class Infinite(ValueError):
    """A value that no scale can bring into the range of the codes."""


class Coded(NamedTuple):
    """Codes of whole blocks as stored bytes, the scale of every block, and whether all of them kept theirs."""

    codes: Bytes
    scales: Floats
    kept: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """How values become codes.

    dtype: the type that the values were stored in, and must come back in. scale_dtype: the type that scales are stored
    in. whole: the scale of the whole tensor, for schemes with one.
    """

    scheme: Scheme
    dtype: DType
    scale_dtype: DType
    whole: np.float32 | None = None

    def codes(self, blocks: Floats, scales: Floats) -> Bytes:
        """The nearest code of every value, one per byte. `blocks` are [block rows, height, block columns, width]."""
        with np.errstate(all="ignore"):
            by = scales if self.whole is None else self.scheme.joined(scales, self.whole)
            by = np.where(by == 0, np.float32(np.inf), by)  # a scale of 0 means that every value is 0
            return self.scheme.codes.codes(blocks / by[:, None, :, None])

    def come_back(self, codes: Bytes, scales: Floats, blocks: Floats) -> Mask:
        """Of every block, whether codes give its values: in their type, or in bfloat16 if they were widened since."""
        found = np.take(self.scheme.codes.table, codes, mode="clip")
        with np.errstate(all="ignore"):
            found *= scales[:, None, :, None]
        self.scheme.apply_whole(found, self.whole)
        back = from_bfloat16(bfloat16(found))
        equal: Mask = back == blocks
        if self.dtype.name != "BF16" and not equal.all():
            equal |= back == from_bfloat16(bfloat16(blocks))
        if self.dtype.name == "F16" and not equal.all():
            with np.errstate(over="ignore"):
                equal |= found.astype(np.float16) == blocks
        if not equal.all():
            equal |= np.isnan(found) & np.isnan(blocks)
        if equal.all():
            return np.ones((blocks.shape[0], blocks.shape[2]), dtype=bool)
        every: Mask = np.logical_and.reduce(equal, axis=(1, 3))
        return every

    def largest(self, blocks: Floats) -> Floats:
        """The largest magnitude of every block; NaN only where codes cannot be NaN, so that the scale must be."""
        bits = np.abs(blocks).view(np.int32)  # magnitudes are ordered like their bits, and NaN comes last
        if self.scheme.codes.nan is not None and (nan := np.isnan(blocks)).any():
            bits[nan] = 0
        found: Floats = np.maximum.reduce(np.maximum.reduce(bits, axis=3), axis=1).view(np.float32)
        return found

    def fitting(self, largest: Floats) -> Floats:
        """New scales for blocks with these largest magnitudes.

        Raises:
            Infinite: one of them is infinite.
        """
        if np.isinf(largest).any():
            raise Infinite
        return self.scheme.fitting(largest, self.scale_dtype, self.whole)


def fit(values: Floats, rule: Rule, grid: Grid, kept: Floats | None) -> Coded:
    """Code `values` [rows, columns] that start at a block; the last blocks may be partial.

    Args:
        kept: the scales that the blocks had, if they had any.

    Raises:
        Infinite: a block holds infinities and its scale does not give them back.
    """
    rows, cols = values.shape
    down = max(1, PART // (grid.height * cols))
    across = max(1, PART // (grid.width * min(rows, down * grid.height)))
    found = []
    for top in range(0, -(-rows // grid.height), down):
        row = []
        for left in range(0, -(-cols // grid.width), across):
            part = values[
                top * grid.height : (top + down) * grid.height, left * grid.width : (left + across) * grid.width
            ]
            old = None if kept is None else kept[top : top + down, left : left + across]
            row.append(_fit_part(part, rule, grid, old))
        found.append(row)
    return Coded(
        np.block([[part.codes for part in row] for row in found]),
        np.block([[part.scales for part in row] for row in found]),
        all(part.kept for row in found for part in row),
    )


def _fit_part(values: Floats, rule: Rule, grid: Grid, kept: Floats | None) -> Coded:
    blocks = _blocks(values, grid)
    scales = kept
    codes: Bytes | None = None
    same: Mask = np.zeros((blocks.shape[0], blocks.shape[2]), dtype=bool)
    if kept is not None:
        codes = rule.codes(blocks, kept)
        same = rule.come_back(codes, kept, blocks)
    if scales is None or codes is None or not same.all():
        largest = rule.largest(blocks)
        scales = rule.fitting(np.where(same, np.float32(0), largest))
        if kept is not None:
            scales = np.where(same, kept, scales)
        codes = rule.codes(blocks, scales)
    flat = codes.reshape(codes.shape[0] * codes.shape[1], -1)[: values.shape[0], : values.shape[1]]
    return Coded(rule.scheme.pack(flat), scales, bool(same.all()))


def _blocks(values: Floats, grid: Grid) -> Floats:
    """[rows, columns] as [block rows, height, block columns, width]; what is missing in partial blocks is 0."""
    rows, cols = values.shape
    height, width = min(grid.height, rows), min(grid.width, cols)
    down, across = -(-rows // height), -(-cols // width)
    if (down * height, across * width) != values.shape:
        padded = np.zeros((down * height, across * width), dtype=np.float32)
        padded[:rows, :cols] = values
        values = padded
    return values.reshape(down, height, across, width)


@dataclass
class Block:
    """One block that is seen in parts: whether its old scale gives all of it back, and its largest magnitude."""

    rule: Rule
    kept: Floats | None  # [1, 1]
    same: bool = field(init=False)
    largest: Floats = field(default_factory=lambda: np.zeros((1, 1), dtype=np.float32), init=False)

    def __post_init__(self) -> None:
        self.same = self.kept is not None

    def add(self, values: Floats) -> None:
        """Look at a part [rows, columns] of the block."""
        blocks = values[None, :, None, :]
        if self.same and self.kept is not None:
            self.same = bool(self.rule.come_back(self.rule.codes(blocks, self.kept), self.kept, blocks).all())
        self.largest = np.maximum(self.largest, self.rule.largest(blocks))

    def scale(self) -> Floats:
        """The scale [1, 1] of the block, after all parts.

        Raises:
            Infinite: it holds infinities and its scale does not give them back.
        """
        if self.same and self.kept is not None:
            return self.kept
        return self.rule.fitting(self.largest)
