"""Factors: one for all of a param or one for every block, and values that went through codes with scales."""

from __future__ import annotations

import numpy as np

from mtp_convert.encodings.minifloat import E4M3
from mtp_convert.hypotheses.agreement import Rounding, Values, agree

# Rows and columns that share a scale; 0 is all of them.
ROW, COLUMN, WHOLE = (1, 0), (0, 1), (0, 0)
BLOCKS = (ROW, COLUMN, (128, 128), (1, 128), (1, 32), (1, 16))
FP8_BLOCKS = (WHOLE, ROW, (128, 128), (1, 128))
FEWEST = 8  # elements that must share a scale to count as evidence
ENOUGH = 64  # values that must lie on a grid
FP4_LEVELS = 8  # magnitudes that e2m1 has
FP4_GROUP = 16  # columns that share a scale in every FP4 format


def block_factor(a: Values, b: Values, rounding: Rounding) -> tuple[str, str] | None:
    """One factor for every row, column or block, in words with the range of the factors; None where B is no such A."""
    loose = Rounding(max(2 * rounding.relative, 2.0**-20), rounding.to_largest)
    for block in BLOCKS:
        h, w = _extent(block, a.shape)
        if not FEWEST <= h * w < a.size or not _even(a, h, w):  # a single block is no evidence
            continue
        corner = slice(0, 2 * h), slice(0, 2 * w)
        if _factors(a[corner], b[corner], h, w, loose) is None:
            continue
        if (factors := _factors(a, b, h, w, loose)) is not None:
            low, high = float(factors.min()), float(factors.max())
            return f"one factor per {_name(block)}, as of scales", f"from {low:.4g} to {high:.4g}"
    return None


def _factors(a: Values, b: Values, h: int, w: int, rounding: Rounding) -> Values | None:
    """The factor of every block; None where there are no such factors."""
    x, y = _blocks(a, h, w), _blocks(b, h, w)
    factors = np.einsum("ij,ij->i", x, y) / np.einsum("ij,ij->i", x, x)
    factors = np.where(np.isfinite(factors), factors, 1.0)
    return factors if agree(x * factors[:, None], y, rounding=rounding) else None


def _extent(block: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    rows, cols = shape
    return min(block[0] or rows, rows), min(block[1] or cols, cols)


def _name(block: tuple[int, int]) -> str:
    return {ROW: "row", COLUMN: "column", WHOLE: "tensor"}.get(block, f"block of {block[0]} x {block[1]}")


def _even(values: Values, h: int, w: int) -> bool:
    return not (values.shape[0] % h or values.shape[1] % w)


def _blocks(values: Values, h: int, w: int) -> Values:
    rows, cols = values.shape
    cut = values.reshape(rows // h, h, cols // w, w).swapaxes(1, 2)
    return cut.reshape(-1, h * w).astype(np.float64)


def coded(true: Values, found: Values) -> str | None:
    """The small format whose codes and scales made `found` of `true`; None where the values lie on no such grid."""
    if found.size < ENOUGH or not (np.isfinite(true).all() and np.isfinite(found).all()):
        return None
    if _is_fp4(true[:ENOUGH], found[:ENOUGH]) and _is_fp4(true, found):
        return "FP4 with block scales"
    for block in FP8_BLOCKS:
        h, w = _extent(block, found.shape)
        if h * w >= FEWEST and _even(found, h, w) and _is_fp8(true, found, h, w):
            return f"FP8 with a scale per {_name(block)}"
    return None


def _is_fp8(true: Values, found: Values, h: int, w: int) -> bool:
    """Whether the values of each block are e4m3 codes times a scale that brings the largest to 448."""
    largest = np.abs(found).max() if h * w == found.size else None
    corner = slice(0, min(h, ENOUGH)), slice(0, w)
    if h * w == found.size and not _on_grid(true[corner], found[corner], largest):
        return False
    if h * w < found.size:
        corner = slice(0, h), slice(0, 2 * w)
        if not _on_grid(_blocks(true[corner], h, w), _blocks(found[corner], h, w)):
            return False
    return _on_grid(_blocks(true, h, w), _blocks(found, h, w))


def _on_grid(true: Values, found: Values, largest: Values | None = None) -> bool:
    """The same for blocks as rows, or for a part of a block whose largest magnitude is given."""
    scales = (np.abs(found).max(axis=1, keepdims=True) if largest is None else largest) / E4M3.largest
    scales = np.where(scales == 0, 1.0, scales)
    codes = np.ascontiguousarray(found / scales, dtype=np.float32)
    grid = E4M3.table[E4M3.codes(codes)]
    if bool((np.abs(codes - grid) > 2.0**-7 * np.abs(grid)).any()):  # the scale is known to bfloat16 only
        return False
    return bool((np.abs(true - found) <= 2.0**-3.9 * np.abs(true) + scales * 2.0**-9).all())


def _is_fp4(true: Values, found: Values) -> bool:
    """Whether every group of columns has as few magnitudes as e2m1, where the true values had more."""
    if found.shape[1] % FP4_GROUP:
        return False
    x, y = (np.sort(np.abs(v.reshape(-1, FP4_GROUP)), axis=1) for v in (true, found))
    levels = [1 + np.count_nonzero(np.diff(side, axis=1) > 2.0**-7 * side[:, 1:], axis=1) for side in (x, y)]
    if levels[1].max() > FP4_LEVELS or np.median(levels[0]) <= FP4_LEVELS:
        return False
    width = 2 * FP4_GROUP if found.shape[1] % (2 * FP4_GROUP) == 0 else FP4_GROUP
    gap, size = np.abs(true - found).reshape(-1, width), np.abs(true).reshape(-1, width)
    return bool((gap <= size.max(axis=1, keepdims=True) / 3).all())
