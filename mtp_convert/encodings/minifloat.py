"""Small floats as codes: FP8 e4m3, FP4 e2m1, and the powers of two of e8m0. float32 holds their values exactly.

e4m3    1 sign, 4 exponent, 3 fraction bits, bias 7: up to 448; 0x7f and 0xff are NaN, there is no infinity
e2m1    1 sign, 2 exponent, 1 fraction bit, bias 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; no NaN; two codes to a byte
e8m0    8 exponent bits: 2 ** (code - 127); 255 is NaN
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class MiniFloat:
    """A signed format of at most eight bits with subnormals; `nan` is the largest magnitude code where it has one."""

    name: str
    fraction: int
    bias: int
    largest: float
    nan: int | None

    @property
    def sign(self) -> int:
        """The bit above the magnitude."""
        return 0x80 if self.nan is not None else 0x8

    @cached_property
    def table(self) -> Floats:
        """The value of every code."""
        code = np.arange(2 * self.sign)
        magnitude = code & (self.sign - 1)
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        normal = (1 + fraction / (1 << self.fraction)) * np.exp2(exponent - self.bias)
        small = fraction * 2.0 ** (1 - self.bias - self.fraction)
        values = np.where(exponent > 0, normal, small)
        if self.nan is not None:
            values[magnitude == self.nan] = np.nan
        return np.copysign(values, np.where(code & self.sign, -1.0, 1.0)).astype(np.float32)

    def codes(self, values: Floats) -> Bytes:
        """The nearest code, ties to the even one; too large becomes the largest. NaN becomes NaN, or 0 without one."""
        shift = np.int32(23 - self.fraction)
        with np.errstate(invalid="ignore"):
            magnitude = np.fmin(np.abs(values), np.float32(self.largest))
            # Adding a power of two whose last bit is the subnormal step makes the processor round to that step.
            step = np.float32(2.0 ** (24 - self.bias - self.fraction))
            small = (magnitude + step).view(np.int32)
        small -= step.view(np.int32)
        bits = magnitude.view(np.int32)
        found = bits >> shift
        found &= np.int32(1)
        found += bits
        found -= np.int32(((127 - self.bias) << 23) + 1 - (1 << (int(shift) - 1)))
        found >>= shift
        # The codes of normal values end where those of subnormal ones begin, and grow more slowly from there on.
        np.maximum(found, np.int32(1 << self.fraction), out=found)
        np.minimum(found, small, out=found)
        nan = np.isnan(values)
        if nan.any():
            found[nan] = self.nan or 0
        sign = values.view(np.int32) >> np.int32(31)
        sign &= np.int32(self.sign)
        found |= sign
        return found.astype(np.uint8)


E4M3 = MiniFloat("e4m3", fraction=3, bias=7, largest=448.0, nan=0x7F)
E2M1 = MiniFloat("e2m1", fraction=1, bias=1, largest=6.0, nan=None)


def pairs(table: Floats) -> npt.NDArray[np.uint64]:
    """For every byte the values of its two codes, the low half first, as one word."""
    both = np.stack([np.tile(table, 16), np.repeat(table, 16)], axis=1)
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(both).view(np.uint64).reshape(256)
    return words


_PAIRS = pairs(E2M1.table)


def unpack_values(raw: Bytes) -> Floats:
    """Two e2m1 values per byte: [rows, n] bytes to [rows, 2 n] values."""
    return np.take(_PAIRS, raw, mode="clip").view(np.float32)


def pack(codes: Bytes) -> Bytes:
    """Two codes per byte, the even column in the low half: [..., 2 n] codes to [..., n] bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def _powers() -> Floats:
    values = np.exp2(np.arange(256, dtype=np.float64) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


POWERS = _powers()  # value of every e8m0 code; 2 ** -127 is a float32 subnormal


def power_codes(values: Floats) -> Bytes:
    """The e8m0 code of powers of two from 2 ** -127 to 2 ** 127; NaN is 255."""
    fraction, exponent = np.frexp(values)
    codes = np.where(np.isnan(fraction), 255, exponent - 1 + 127)
    return codes.astype(np.uint8)


def ceil_power(values: Floats, largest: float) -> Floats:
    """The smallest power of two by which values must be divided to be at most `largest`; 1 for 0, NaN for NaN."""
    fraction, exponent = np.frexp(values)
    top, top_exponent = np.frexp(np.float32(largest))
    exponent = np.clip(exponent - top_exponent + (fraction > top), -127, 127)
    powers = np.ldexp(np.float32(1), exponent).astype(np.float32)
    powers = np.where(values == 0, np.float32(1), powers)
    return np.where(np.isnan(values), np.float32(np.nan), powers)


def bfloat16(values: Floats) -> Words:
    """The nearest bfloat16 as its bits, ties to even. NaN keeps its sign."""
    bits = values.view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0 | (bits[nan] >> np.uint32(16)) & np.uint32(0x8000)
    return rounded.astype(np.uint16)


def from_bfloat16(words: Words) -> Floats:
    """The values of bfloat16 bits."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
