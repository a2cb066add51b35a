"""Pieces and gather against numpy: every pair of layouts, random chunkings, random windows of random chunks."""

import random
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from _stores import KINDS, PARAMS, Array, Case, boxes, cases, layout, store
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_convert.encodings.dtype import BY_NAME, DType
from mtp_convert.engine import gather
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.mapping.plan import make_plan
from mtp_convert.mapping.views import Shape

PAIRS = list(product(KINDS, KINDS))
BY_SIZE = {1: BY_NAME["U8"], 2: BY_NAME["BF16"], 4: BY_NAME["F32"], 8: BY_NAME["I64"]}


def random_params(shape: Shape, itemsize: int, rng: random.Random) -> list[Array]:
    n = int(np.prod(shape))
    return [np.frombuffer(rng.randbytes(n * itemsize), f"u{itemsize}").reshape(shape) for _ in range(PARAMS)]


def random_window(case: Case, rng: random.Random) -> tuple[Shape, Shape, int, int]:
    """A random chunk of the target tensor and a random byte range of it."""
    shape = case.wanted.shape
    offset = tuple(rng.randrange(n) for n in shape)
    sizes = tuple(rng.randint(1, n - o) for n, o in zip(shape, offset, strict=True))
    total = int(np.prod(sizes)) * case.dtype.itemsize
    lo = rng.randrange(total)
    return offset, sizes, lo, rng.randint(lo, total)


def check_windows(kinds: tuple[str, str], itemsize: int, rng: random.Random, shape: Shape) -> None:
    with tempfile.TemporaryDirectory() as folder:
        params = random_params(shape, itemsize, rng)
        for case in cases(Path(folder), kinds, params, BY_SIZE[itemsize], rng):
            full = case.wanted.shape
            assert case.fill((0,) * len(full), full, 0, case.wanted.nbytes) == case.wanted.tobytes()
            for _ in range(3):
                offset, sizes, lo, hi = random_window(case, rng)
                assert case.fill(offset, sizes, lo, hi) == case.chunk(offset, sizes).tobytes()[lo:hi]


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@settings(max_examples=6, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 4, 8]))
def test_windows_equal_numpy(kinds: tuple[str, str], rng: random.Random, itemsize: int) -> None:
    check_windows(kinds, itemsize, rng, (2 * rng.randint(1, 4), rng.randint(1, 6)))


@pytest.mark.parametrize(("scratch", "long_run"), [(16, 1 << 30), (64, 24), (1 << 20, 1), (1, 1 << 30)])
@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(PAIRS), st.sampled_from([1, 2, 4]))
def test_every_way_to_copy_gives_the_same_bytes(
    scratch: int, long_run: int, rng: random.Random, kinds: tuple[str, str], itemsize: int
) -> None:
    """A tiny scratch buffer cuts spans in parts; a short `LONG_RUN` reads run by run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "SCRATCH", scratch)
        patch.setattr(gather, "LONG_RUN", long_run)
        check_windows(kinds, itemsize, rng, (2 * rng.randint(1, 6), rng.randint(1, 9)))


@pytest.mark.parametrize(
    ("sizes", "source", "target", "runs"),
    [
        ((3, 4, 2), (8, 2, 1), (8, 2, 1), [(24, 1, 1)]),
        ((3, 4, 2), (80, 2, 1), (8, 2, 1), [(3, 80, 8), (8, 1, 1)]),
        ((3, 1, 2), (2, 99, 1), (2, 7, 1), [(6, 1, 1)]),
        ((4, 3, 2), (2, 8, 1), (6, 2, 1), [(4, 2, 6), (3, 8, 2), (2, 1, 1)]),
        ((4, 3, 2), (2, 8, 1), (2, 8, 1), [(24, 1, 1)]),
        ((5, 1), (3, 1), (1, 1), [(5, 3, 1), (1, 1, 1)]),
        ((1, 1), (9, 1), (9, 1), [(1, 1, 1)]),
    ],
)
def test_a_box_is_reduced_to_its_fewest_runs(
    sizes: Shape, source: Shape, target: Shape, runs: list[tuple[int, int, int]]
) -> None:
    assert gather.reduce(sizes, source, target) == runs


def test_a_tiny_scratch_buffer_really_cuts_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = Reader._in_parts
    monkeypatch.setattr(gather, "SCRATCH", 64)
    monkeypatch.setattr(Reader, "_in_parts", lambda self, *a: calls.append(1) or whole(self, *a))
    check_windows(("separate", "transposed"), 2, random.Random(1), (40, 30))
    assert calls


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.sampled_from(["separate", "stack"]))
def test_padding_is_zero(rng: random.Random, rows: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for plain in cases(Path(folder), (kind, "separate"), random_params((4, 3), 2, rng), BY_SIZE[2], rng):
            case = plain.padded(rows)
            for _ in range(4):
                offset, sizes, lo, hi = random_window(case, rng)
                assert case.fill(offset, sizes, lo, hi) == case.chunk(offset, sizes).tobytes()[lo:hi]


FLOATING = ("F64", "F32", "F16", "BF16")


def float_params(shape: Shape, dtype: DType, seed: int) -> list[Array]:
    """Values across the range of the type, with subnormals, infinities and -0 (torch keeps no bits of a NaN)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(PARAMS):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-9, 6, shape, generator=generator)
        values.view(-1)[:3] = torch.tensor([float("inf"), -float("inf"), -0.0])
        found.append(values.to(dtype.torch()).view(torch.uint8).numpy().view(f"u{dtype.itemsize}").reshape(shape))
    return found


@pytest.mark.parametrize(("was", "to"), [p for p in product(FLOATING, FLOATING) if p[0] != p[1]])
@pytest.mark.parametrize("kinds", [("separate", "rows"), ("stack", "transposed"), ("grouped", "columns")], ids="-".join)
def test_casts_round_as_torch_does(tmp_path: Path, kinds: tuple[str, str], was: str, to: str) -> None:
    rng = random.Random(f"{was}{to}")
    old, new = BY_NAME[was], BY_NAME[to]
    for case in cases(tmp_path, kinds, float_params((6, 5), old, 3), old, rng):
        raw = torch.from_numpy(np.ascontiguousarray(case.wanted).view(np.uint8)).view(old.torch())
        wanted = raw.to(new.torch()).view(torch.uint8).numpy().tobytes()
        zero = (0,) * case.wanted.ndim
        assert case.fill(zero, case.wanted.shape, 0, len(wanted), new) == wanted
        for _ in range(5):
            lo = rng.randrange(len(wanted))
            hi = rng.randint(lo, len(wanted))
            assert case.fill(zero, case.wanted.shape, lo, hi, new) == wanted[lo:hi]


@pytest.mark.parametrize("to", ["F32", "F16", "BF16"])
def test_not_a_number_stays_one(tmp_path: Path, to: str) -> None:
    value = np.full((3, 5), np.nan).view("u8")
    case = next(cases(tmp_path, ("separate", "separate"), [value] * PARAMS, BY_NAME["F64"], random.Random(0)))
    raw = case.fill((0, 0), (3, 5), 0, 15 * BY_NAME[to].itemsize, BY_NAME[to])
    assert torch.frombuffer(bytearray(raw), dtype=BY_NAME[to].torch()).isnan().all()


def test_padding_is_zero_after_a_cast(tmp_path: Path) -> None:
    rng = random.Random(4)
    case = next(cases(tmp_path, ("rows", "separate"), float_params((2, 3), BY_NAME["F32"], 1), BY_NAME["F32"], rng))
    out = case.padded(2).fill((0, 0), (4, 3), 0, 24, BY_NAME["BF16"])
    assert out[12:] == bytes(12)
    assert out[:12] != bytes(12)


def mean_of(tmp_path: Path, values: Sequence[torch.Tensor], target: DType) -> torch.Tensor:
    """The mean of params p.0, p.1, .. as the engine computes it, window by window."""
    rng = random.Random(len(values))
    dtype = next(d for d in BY_NAME.values() if d.torch_name == str(values[0].dtype).removeprefix("torch."))
    source = layout("separate", tuple(values[0].shape))
    stored = {}
    for e in range(PARAMS):
        array = values[e % len(values)].view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
        stored[f"t.{e}"] = store(tmp_path, f"{target}{dtype}{e}", array, dtype, boxes(array.shape, rng, 4), rng)
    names = tuple(f"p.{e}" for e in range(len(values)))
    step = make_plan(source, source, alias=lambda p: names).steps[0]
    shape = tuple(values[0].shape)
    extent, reader = TensorExtent(step, stored, target, (0, 0), shape), Reader()
    raw = np.full(extent.nbytes, 0xA5, dtype=np.uint8)
    for lo in range(0, extent.nbytes, 7):  # windows that cut elements
        extent.fill(reader, raw[lo : lo + 7], lo, min(lo + 7, extent.nbytes))
    reader.close()
    return torch.from_numpy(raw).view(target.torch()).reshape(shape)


@pytest.mark.parametrize("target", ["F32", "BF16"])
@pytest.mark.parametrize("source", ["F32", "BF16"])
def test_the_mean_is_rounded_once(tmp_path: Path, source: str, target: str) -> None:
    torch.manual_seed(0)
    values = [torch.randn(5, 7).to(BY_NAME[source].torch()) for _ in range(PARAMS)]
    wanted = torch.stack(values).double().mean(0).to(BY_NAME[target].torch())
    assert torch.equal(mean_of(tmp_path, values, BY_NAME[target]), wanted)


@pytest.mark.parametrize("depths", [2, 3])
def test_the_mean_of_equal_depths_is_that_depth(tmp_path: Path, depths: int) -> None:
    torch.manual_seed(1)
    value = torch.randn(50, 20)
    assert torch.equal(mean_of(tmp_path, [value] * depths, BY_NAME["F32"]), value)
