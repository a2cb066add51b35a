"""`compare`: equal bits cost nothing, differences are counted and measured, whatever the chunks and types."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from _stores import boxes, store

from mtp_convert.containers.base import StoredChunk, StoredTensor
from mtp_convert.encodings.dtype import BY_NAME, BY_TORCH_NAME, DTYPES, DType
from mtp_convert.engine import compare as module
from mtp_convert.engine.compare import Difference, StoredExtent, compare, compare_all
from mtp_convert.engine.gather import Bytes, Reader


@dataclass
class Values:
    """An extent that lies in memory."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> DType:
        return BY_TORCH_NAME[str(self.tensor.dtype).removeprefix("torch.")]

    @property
    def raw(self) -> Bytes:
        raw: Bytes = self.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw

    @property
    def nbytes(self) -> int:
        return len(self.raw)

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        out[:] = self.raw[lo:hi]


def compared(a: torch.Tensor, b: torch.Tensor) -> Difference | None:
    reader = Reader()
    try:
        return compare(Values(a), Values(b), reader)
    finally:
        reader.close()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS", 16)


def ramp(dtype: DType, n: int = 50) -> torch.Tensor:
    return (torch.arange(n) % 7 + 1).to(torch.float32).to(dtype.torch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_and_one_element_off(dtype: DType) -> None:
    a = ramp(dtype)
    assert compared(a, a.clone()) is None
    if dtype.name == "BOOL":
        return
    raw = a.clone().view(torch.uint8).reshape(50, -1)
    raw[37] = ramp(dtype).view(torch.uint8).reshape(50, -1)[36]  # 37 % 7 + 1 = 3, 36 % 7 + 1 = 2
    b = raw.reshape(-1).view(dtype.torch())
    found = compared(a, b)
    assert found is not None
    assert (found.count, found.first) == (1, 37)
    values = ramp(dtype).double()
    assert found.max_abs == pytest.approx(float(values[37] - values[36]))
    assert found.norms[0] == pytest.approx(float(values.norm()))


def test_counts_first_and_norms_over_all_windows() -> None:
    a, b = torch.arange(60, dtype=torch.float32), torch.arange(60, dtype=torch.float32)
    b[[20, 21, 55]] += torch.tensor([1.0, -4.0, 2.0])
    found = compared(a, b)
    assert found is not None
    assert (found.count, found.first, found.max_abs) == (3, 20, 4.0)
    assert found.norms == pytest.approx((float(a.double().norm()), float(b.double().norm())))
    assert found.text() == "3 elements differ, first at 20, max difference 4"


def test_equal_nans_are_equal_and_a_new_one_is_an_infinite_difference() -> None:
    a = torch.ones(20)
    a[3] = float("nan")
    assert compared(a, a.clone()) is None
    found = compared(a, torch.ones(20))
    assert found is not None
    assert (found.count, found.first, found.max_abs) == (1, 3, float("inf"))


def test_an_infinity_is_an_infinite_difference() -> None:
    b = torch.ones(20)
    b[5] = float("inf")
    found = compared(torch.ones(20), b)
    assert found is not None
    assert found.max_abs == float("inf")


def test_the_sign_of_zero_is_a_bit() -> None:
    found = compared(torch.zeros(4), -torch.zeros(4))
    assert found is not None
    assert (found.count, found.max_abs) == (4, 0.0)


def test_different_types_compare_by_value() -> None:
    a = torch.tensor([1.0, 2.5, float("nan"), 0.0], dtype=torch.bfloat16)
    assert compared(a, a.float()) is None
    assert compared(a, a.to(torch.float16)) is None
    found = compared(a, torch.tensor([1.0, 2.5, float("nan"), 1e-3]))
    assert found is not None
    assert (found.count, found.first) == (1, 3)
    assert found.max_abs == pytest.approx(1e-3)
    assert compared(torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int8)) is None


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of elements"):
        compared(torch.ones(3), torch.ones(4))


def test_progress_counts_every_byte_once() -> None:
    seen: list[int] = []
    compare(Values(torch.ones(50)), Values(torch.ones(50)), Reader(), progress=seen.append)
    assert sum(seen) == 200


@pytest.mark.parametrize("seed", range(8))
def test_stored_tensors_compare_across_chunkings(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    array = np.frombuffer(rng.randbytes(2 * 6 * 5 * 4), "u2").reshape(6, 5, 4)
    dtype = BY_NAME["BF16"]
    a = StoredExtent(store(tmp_path, "a", array, dtype, boxes(array.shape, rng, 5), rng))
    b = StoredExtent(store(tmp_path, "b", array, dtype, boxes(array.shape, rng, 9), rng))
    other = array.copy()
    other[4, 3, 2] ^= 1
    c = StoredExtent(store(tmp_path, "c", other, dtype, boxes(array.shape, rng, 3), rng))
    assert compare(a, b, Reader()) is None
    found = compare(a, c, Reader())
    assert found is not None
    assert (found.count, found.first) == (1, (4 * 5 + 3) * 4 + 2)


def test_an_empty_chunk_holds_nothing(tmp_path: Path) -> None:
    """torch_dist may store chunks without elements; what lies at their position belongs to others."""
    path = tmp_path / "t"
    path.write_bytes(bytes([9, 9, 1, 2, 3, 4]))
    chunks = (StoredChunk((0,), (4,), path, 2), StoredChunk((2,), (0,), path, 0))
    tensor = StoredTensor("t", BY_NAME["U8"], (4,), chunks)
    wanted = Values(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    assert compare(StoredExtent(tensor), wanted, Reader()) is None


def test_many_pairs_at_once_are_measured_like_each_alone() -> None:
    """Whatever the number of threads: sums are taken in the order of the windows."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(n, generator=generator) for n in (50, 16, 1, 100, 33)]
    b = [a[0] + 1, a[1].clone(), a[2] * 2, torch.cat([a[3][:70], a[3][70:] - 1]), a[4].double()]
    pairs = [(Values(x), Values(y)) for x, y in zip(a, b, strict=True)]
    alone = [compared(x, y) for x, y in zip(a, b, strict=True)]
    assert [d is None for d in alone] == [False, True, False, False, True]
    for threads in (1, 3):
        seen: list[int] = []
        assert compare_all(pairs, threads=threads, progress=seen.append) == alone
        assert sum(seen) == sum(x.nbytes for x in a)


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ValueError, match="different numbers of elements"):
        compare_all([(Values(torch.ones(3)), Values(torch.ones(3))), (Values(torch.ones(3)), Values(torch.ones(4)))])


def test_figures_of_a_difference() -> None:
    a = torch.linspace(-2, 3, 60)
    b = a.clone()
    b[[20, 55]] += torch.tensor([1.0, -4.0])
    found = compared(a, b)
    assert found is not None
    assert (found.total, found.values) == (60, (float(a[20]), float(b[20])))
    x, y = a.double(), b.double()
    assert found.relative == pytest.approx(4 / 3)
    assert found.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()))
    bits = [(20, a[20], b[20]), (55, a[55], b[55])]
    assert [tuple(e) for e in found.examples] == [(i, raw(x), raw(y)) for i, x, y in bits]


def raw(value: torch.Tensor) -> int:
    return int(value.view(torch.int32)) & 0xFFFFFFFF


def test_figures_that_are_no_numbers() -> None:
    zeros = compared(torch.zeros(5), torch.ones(5))
    assert zeros is not None
    assert (zeros.relative, str(zeros.cosine)) == (float("inf"), "nan")
    infinite = compared(torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0]))
    assert infinite is not None
    assert (str(infinite.relative), str(infinite.cosine)) == ("nan", "nan")
