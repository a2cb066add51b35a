"""`explain`: every kind of change is named, to the bit or to rounding, and nothing is named that did not happen."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp_convert.encodings.minifloat import E2M1, E4M3, bfloat16, from_bfloat16
from mtp_convert.hypotheses.agreement import Rounding
from mtp_convert.hypotheses.explain import Guess, Sample, explain, flipped
from mtp_convert.hypotheses.permutations import known_orders

Values = npt.NDArray[np.float32]
F32, BF16 = Rounding(2.0**-23), Rounding(2.0**-7)
SHAPES = st.sampled_from([(2, 3), (4, 4), (6, 5), (8, 24), (24, 8), (30, 7), (64, 16), (48,)])


def normal(*shape: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_bfloat16(x: Values) -> Values:
    return from_bfloat16(bfloat16(np.ascontiguousarray(x)))


def guess(a: Values, b: Values, rounding: Rounding = F32) -> Guess | None:
    return explain(Sample.whole(a, np.ascontiguousarray(b)), rounding)


def through_fp8(x: Values, block: tuple[int, int]) -> Values:
    """Codes times scales, one for every block."""
    h, w = block
    cut = x.reshape(x.shape[0] // h, h, -1, w)
    scales = np.abs(cut).max(axis=(1, 3), keepdims=True) / np.float32(448)
    codes = E4M3.codes(np.ascontiguousarray(cut / scales))
    return (E4M3.table[codes] * scales).reshape(x.shape)


def through_fp4(x: Values, width: int) -> Values:
    cut = x.reshape(x.shape[0], -1, width)
    scales = np.exp2(np.ceil(np.log2(np.abs(cut).max(axis=2, keepdims=True) / 6))).astype(np.float32)
    return (E2M1.table[E2M1.codes(np.ascontiguousarray(cut / scales))] * scales).reshape(x.shape)


A = normal(32, 32)
TALL = normal(64, 32, seed=1)
WIDE = normal(256, 256, seed=2)
PER_ROW = np.linspace(0.5, 3, 64, dtype=np.float32)[:, None]
PER_BLOCK = np.repeat(np.repeat(np.array([[1, 3], [0.7, 5]], np.float32), 128, 0), 128, 1)
CHANGES: dict[str, tuple[Values, Callable[[Values], Values], str, str]] = {
    "negated": (A, np.negative, "sign flipped", "exact"),
    "plus one": (A, lambda x: x + 1, "offset +1, as of norms that count from 0 or from 1", "exact"),
    "minus one": (TALL[:, 0], lambda x: x - 1, "offset -1, as of norms that count from 0 or from 1", "exact"),
    "offset": (A, lambda x: x + np.float32(0.25), "offset +0.25", "exact"),
    "power of two": (A, lambda x: x / 8, "factor 2^-3", "exact"),
    "negative power": (A, lambda x: -4 * x, "factor -2^2", "exact"),
    "factor per row": (TALL, lambda x: x * PER_ROW, "one factor per row, as of scales", "rounding"),
    "factor per column": (TALL.T.copy(), lambda x: x * PER_ROW.T, "one factor per column, as of scales", "rounding"),
    "factor per block": (WIDE, lambda x: x * PER_BLOCK, "one factor per block of 128 x 128, as of scales", "rounding"),
    "bf16": (A, to_bfloat16, "cast: B is A rounded to BF16", "exact"),
    "fp16": (A, lambda x: x.astype(np.float16).astype(np.float32), "cast: B is A rounded to F16", "exact"),
    "fp8": (A, lambda x: E4M3.table[E4M3.codes(x)], "cast: B is A rounded to F8_E4M3", "exact"),
    "fp8 per row": (A, lambda x: through_fp8(x, (1, 32)), "cast: B is A through FP8 with a scale per row", "rounding"),
    "fp8 per block": (
        WIDE,
        lambda x: through_fp8(x, (128, 128)),
        "cast: B is A through FP8 with a scale per block of 128 x 128",
        "rounding",
    ),
    "fp4": (WIDE, lambda x: through_fp4(x, 32), "cast: B is A through FP4 with block scales", "rounding"),
    "zeroed": (A, np.zeros_like, "zeroed in B", "exact"),
    "ones": (A, np.ones_like, "1 everywhere in B", "exact"),
    "ones to zeros": (np.ones(8, np.float32), np.zeros_like, "1 everywhere became 0", ""),
    "transposed": (A, np.transpose, "transposed", "exact"),
    "transposed in the old shape": (TALL, lambda x: x.T.reshape(x.shape), "transposed", "exact"),
    "halves": (TALL, lambda x: np.roll(x, 32, 0), "halves of the rows swapped", "exact"),
    "halves of columns": (TALL, lambda x: np.roll(x, 16, 1), "halves of the columns swapped", "exact"),
    "gate and up interleaved": (
        TALL,
        lambda x: x.reshape(2, 32, 32).swapaxes(0, 1).reshape(64, 32),
        "halves of the rows interleaved",
        "exact",
    ),
    "rotary to pairs": (
        TALL,
        lambda x: x.reshape(4, 2, 8, 32).swapaxes(1, 2).reshape(64, 32),
        "halves of every block of 16 rows interleaved",
        "exact",
    ),
    "rotary to halves": (
        TALL,
        lambda x: x.reshape(4, 8, 2, 32).swapaxes(1, 2).reshape(64, 32),
        "pairs of every block of 16 rows taken apart into halves",
        "exact",
    ),
    "rotary halves": (
        TALL,
        lambda x: x.reshape(4, 2, 8, 32)[:, ::-1].reshape(64, 32),
        "halves of every block of 16 rows swapped",
        "exact",
    ),
    "heads by group": (
        normal(60, 8),
        lambda x: x.reshape(3, 4, 5, 8).swapaxes(1, 2).reshape(60, 8),
        "every block of 20 rows read as 4 x 5 and transposed",
        "exact",
    ),
    "reversed": (TALL, lambda x: x[::-1], "order of the rows reversed", "exact"),
    "off by one": (TALL, lambda x: np.roll(x, 1, 0), "rows shifted by +1", "exact"),
    "heads": (
        TALL,
        lambda x: x.reshape(4, 16, 32)[[2, 0, 1, 3]].reshape(64, 32),
        "blocks of 16 rows permuted",
        "exact",
    ),
    "convolution reversed": (normal(16, 1, 4), lambda x: x[:, :, ::-1], "order of the columns reversed", "exact"),
    "one head zeroed": (
        TALL,
        lambda x: np.r_[x[:8], 0 * x[8:16], x[16:]],
        "only in a run of rows: zeroed in B",
        "exact",
    ),
    "last columns negated": (
        TALL,
        lambda x: np.c_[x[:, :24], -x[:, 24:]],
        "only in a run of columns: sign flipped",
        "exact",
    ),
    "NaN": (A, lambda x: np.where(x > 1, np.float32("nan"), x), "B is not finite where they differ", ""),
    "signs of zeros": (A * 0 + 0, lambda x: -x, "equal values in other bits, as -0 and 0", ""),
    "new start": (
        normal(64, 64),
        lambda x: normal(64, 64, seed=9),
        "unrelated values of the same spread, as of a new initialisation",
        "",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_named(name: str) -> None:
    a, change, what, fit = CHANGES[name]
    found = guess(a, change(a).astype(np.float32))
    assert found is not None
    assert (found.what, found.fit, found.sampled) == (what, fit, False)


@pytest.mark.parametrize("name", [n for n, c in CHANGES.items() if c[3] == "exact" and not n.startswith(("bf", "fp"))])
def test_change_is_named_where_one_side_is_bfloat16(name: str) -> None:
    """What came out of the change was rounded on the way: still the same change."""
    a, change, what, _ = CHANGES[name]
    found = guess(a, to_bfloat16(change(a).astype(np.float32)), Rounding(2.0**-24 + 2.0**-8))
    assert found is not None
    assert found.what == what
    assert found.fit in ("exact", "rounding")


def test_the_factor_that_fits() -> None:
    found = guess(A, A * np.float32(0.37))
    assert found is not None
    assert found.what == "factor 0.37"


def test_the_other_way_round() -> None:
    for name, what in (("bf16", "cast: A is B rounded to BF16"), ("fp4", "cast: A is B through FP4 with block scales")):
        a, change, _, _ = CHANGES[name]
        found = guess(change(a), a)
        assert found is not None
        assert found.what == what


def test_details_of_an_exchange() -> None:
    order = np.arange(32)
    order[[3, 17]] = 17, 3
    found = guess(A, A[order])
    assert found == Guess("rows permuted", "rows 3 and 17 exchanged", "exact")


def test_few_elements() -> None:
    b = A.copy()
    b[3, 4] += 1
    assert guess(A, b) == Guess("one element changed")
    b[7, 1] -= 0.3
    assert guess(A, b) == Guess("a few elements changed")


@pytest.mark.parametrize(
    ("dtype", "bit", "name"),
    [
        ("F32", 31, "sign"),
        ("F32", 30, "exponent"),
        ("F32", 3, "fraction"),
        ("BF16", 14, "exponent"),
        ("F16", 9, "fraction"),
    ],
)
def test_flipped_bit(dtype: str, bit: int, name: str) -> None:
    found = flipped([(0x1234, 0x1234 ^ 1 << bit)], dtype)
    assert found == Guess("one bit flipped", f"bit {bit} ({name})", "exact")


def test_two_bits_of_one_element_are_no_flip() -> None:
    assert flipped([(0, 3)], "F32") is None
    assert flipped([(0, 1), (0, 3)], "F32") is None


@given(shape=SHAPES, seed=st.integers(0, 2**32), scale=st.sampled_from([0.02, 0.3, 3.0]))
@settings(deadline=None, max_examples=50)
def test_independent_values_are_not_explained(shape: tuple[int, ...], seed: int, scale: float) -> None:
    """Only that they may be two draws of one distribution can be said of them, and only where they are many."""
    a, b = normal(*shape, seed=seed), scale * normal(*shape, seed=seed + 1)
    found = guess(a, b)
    if found is not None:
        assert found.what.startswith("unrelated")
        assert prod(shape) >= 64


@given(seed=st.integers(0, 2**32), size=st.sampled_from([0.001, 0.03]))
@settings(deadline=None, max_examples=30)
def test_more_training_is_not_explained(seed: int, size: float) -> None:
    a = normal(32, 32, seed=seed)
    assert guess(a, a + size * normal(32, 32, seed=seed + 1)) is None


@given(data=st.data(), rows=st.integers(2, 40), columns=st.integers(1, 9), roundoff=st.sampled_from([F32, BF16]))
@settings(deadline=None, max_examples=50)
def test_any_order_of_rows_is_found(data: st.DataObject, rows: int, columns: int, roundoff: Rounding) -> None:
    order = data.draw(st.permutations(range(rows)))
    assume(order != sorted(order))
    a = normal(rows, columns, seed=rows)
    b = a[np.array(order)]
    found = guess(a, to_bfloat16(b) if roundoff is BF16 else b, roundoff)
    assert found is not None
    assert "row" in found.what or "transposed" in found.what  # some orders of a vector or of 2 x 2 are a transpose
    assert found.fit in ("exact", "rounding")


@given(data=st.data(), block=st.sampled_from([2, 3, 8]), count=st.integers(3, 12))
@settings(deadline=None, max_examples=30)
def test_moved_blocks_are_moved_rows(data: st.DataObject, block: int, count: int) -> None:
    order = data.draw(st.permutations(range(count)))
    assume(order != sorted(order))
    a = normal(count * block, 4)
    b = a.reshape(count, block, 4)[np.array(order)].reshape(-1, 4)
    found = guess(a, b)
    assert found is not None
    assert "row" in found.what
    assert found.fit == "exact"


@pytest.mark.parametrize("count", [2, 3, 4, 12, 30, 64])
def test_known_orders_are_orders(count: int) -> None:
    for what, order in known_orders(count):
        assert sorted(order) == list(range(count)), what
        assert list(order) != list(range(count)), what


@given(rows=st.sampled_from([4, 12, 30, 48]), data=st.data())
@settings(deadline=None, max_examples=30)
def test_an_order_with_a_name_survives_rounding(rows: int, data: st.DataObject) -> None:
    """Also where no row can be looked up: every value is a bit off."""
    _, order = data.draw(st.sampled_from(list(known_orders(rows))))
    a = normal(rows, 16)
    found = guess(a, a[order] * (1 + 0.03 * normal(rows, 16, seed=5).clip(-1, 1)), Rounding(2.0**-4))
    assert found is not None
    assert found.fit == "rounding"
    assert "rows" in found.what


def test_samples_say_so() -> None:
    a = normal(64, 64)
    b = np.roll(a, 32, 1)
    found = explain(Sample((a[:8], b[:8]), (a[:, :8], b[:, :8])), F32)
    assert found == Guess("halves of the columns swapped", "", "exact", sampled=True)


def test_a_change_of_a_few_rows_is_not_one_of_all() -> None:
    """Sampled rows gather around a difference."""
    a = normal(8, 64)
    found = explain(Sample((a, -a), (a[:, :4], -a[:, :4])), F32, share=0.001)
    assert found is None
