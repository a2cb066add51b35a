"""Every code of the small floats, and rounding to them, against formulas and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _reference import e2m1_value, e4m3_value, e8m0_value
from numpy.typing import NDArray

from mtp_convert.encodings.minifloat import (
    E2M1,
    E4M3,
    POWERS,
    MiniFloat,
    bfloat16,
    ceil_power,
    from_bfloat16,
    pack,
    power_codes,
    unpack_values,
)

Floats = NDArray[np.float32]


def floats(seed: int, count: int = 1 << 17) -> Floats:
    """Any bits, and numbers of a usual size."""
    noise = np.random.default_rng(seed)
    some = noise.standard_normal(count) * np.exp2(noise.uniform(-14, 10, count))
    quiet = noise.integers(0, 1 << 32, count, dtype=np.uint32) | np.uint32(1 << 22)  # no signalling NaN
    return np.concatenate([quiet.view(np.float32), some.astype(np.float32)])


def around_ties(format: MiniFloat) -> Floats:
    """The middle of every two neighbours, and the float32 on both sides of it, with both signs."""
    values = np.unique(format.table[np.isfinite(format.table)]).astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    both = [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    return np.concatenate([*both, values.astype(np.float32)])


def equal(a: Floats, b: Floats) -> bool:
    """Bit for bit, NaN by its sign alone."""
    nan = np.isnan(a)
    if not np.array_equal(nan, np.isnan(b)) or not np.array_equal(np.signbit(a), np.signbit(b)):
        return False
    return np.array_equal(a[~nan], b[~nan])


def test_e4m3_values() -> None:
    by_formula = np.array([e4m3_value(c) for c in range(256)], dtype=np.float32)
    by_torch = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3.table, by_formula, equal_nan=True)
    assert equal(E4M3.table, by_torch)
    assert np.signbit(E4M3.table[0x80])


def test_e2m1_values() -> None:
    assert equal(E2M1.table, np.array([e2m1_value(c) for c in range(16)], dtype=np.float32))


def test_e8m0_values() -> None:
    by_torch = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(POWERS, by_torch, equal_nan=True)
    assert POWERS[0] == 2.0**-127
    assert np.array_equal(POWERS, [np.float32(e8m0_value(c)) for c in range(256)], equal_nan=True)
    assert np.array_equal(power_codes(POWERS), np.arange(256))


@pytest.mark.parametrize("values", [floats(0), floats(1), around_ties(E4M3)], ids=["bits", "more bits", "ties"])
def test_rounding_to_e4m3_is_torchs(values: Floats) -> None:
    found = E4M3.codes(values)
    inside = np.abs(values) <= 448
    by_torch = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(found[inside], by_torch[inside])


@pytest.mark.parametrize("values", [floats(2), around_ties(E2M1)], ids=["bits", "ties"])
def test_rounding_to_e2m1_is_the_nearest(values: Floats) -> None:
    finite = values[np.isfinite(values)]
    found = E2M1.codes(finite)
    distance = np.abs(np.minimum(np.abs(finite), 6)[:, None].astype(np.float64) - E2M1.table[:8])
    least = distance.min(axis=1)
    assert np.array_equal(np.take_along_axis(distance, (found & 7)[:, None].astype(int), 1)[:, 0], least)
    tie = (distance == least[:, None]).sum(axis=1) > 1
    assert not (found[tie] & 1).any()
    assert np.array_equal(found >= 8, np.signbit(finite))


def test_rounding_at_the_ends() -> None:
    ends = np.array([449, 1e38, np.inf, -np.inf, np.nan, -0.0, 2.0**-10, 2.0**-149], dtype=np.float32)
    assert [hex(c) for c in E4M3.codes(ends)] == ["0x7e", "0x7e", "0x7e", "0xfe", "0x7f", "0x80", "0x0", "0x0"]
    assert list(E2M1.codes(np.array([5, 7, np.inf, -7, np.nan, -0.0, 0.25], dtype=np.float32))) == [
        *(6, 7, 7, 15, 0, 8, 0)
    ]
    assert E4M3.codes(np.array([-np.nan], dtype=np.float32))[0] == 0xFF


def test_every_code_comes_back() -> None:
    assert np.array_equal(E4M3.codes(E4M3.table), np.arange(256))
    assert np.array_equal(E2M1.codes(E2M1.table), np.arange(16))


def test_bfloat16_is_torchs() -> None:
    values = floats(3)
    found = from_bfloat16(bfloat16(values))
    assert np.array_equal(found, torch.from_numpy(values).bfloat16().float().numpy(), equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(values))
    assert equal(from_bfloat16(bfloat16(found)), found)


def test_low_half_is_the_even_column() -> None:
    raw = np.array([[0x21, 0xF8]], dtype=np.uint8)
    assert unpack_values(raw).tolist() == [[0.5, 1.0, -0.0, -6.0]]
    codes = np.random.default_rng(4).integers(0, 16, (3, 8), dtype=np.uint8)
    assert np.array_equal(unpack_values(pack(codes)), E2M1.table[codes])


def test_smallest_power_that_fits() -> None:
    values = np.array([448, 448.01, 449, 224, 896, 0, 1e-45, 3e38], dtype=np.float32)
    assert ceil_power(values, 448).tolist() == [1, 2, 2, 0.5, 2, 1, 2.0**-127, 2.0**120]
    assert ceil_power(np.array([6, 6.01, 3, 3.01], dtype=np.float32), 6).tolist() == [1, 2, 0.5, 1]
    assert np.isnan(ceil_power(np.array([np.nan], dtype=np.float32), 6)).all()
    some = np.abs(floats(5)[-(1 << 12) :])
    powers = ceil_power(some, 6)
    assert (some <= 6 * powers).all()
    assert (some > 3 * powers).all()
