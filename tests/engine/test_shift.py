"""Tensors whose values two layouts count from different numbers, against torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mtp_convert.containers.base import StoredChunk, StoredTensor
from mtp_convert.encodings.dtype import BY_TORCH_NAME
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.mapping.layout import Layout, build
from mtp_convert.mapping.plan import Step, make_plan
from mtp_convert.mapping.rules import Block, Param, Placed, Row, rule

N = 5000  # more elements than a window below
FLOATS = ("float32", "bfloat16", "float16", "float64")


def layout(name: str, *rows: Row) -> Layout:
    block = Block((Param("w.{i}", (N,)),), {name: rows}, {"i": range(2)})
    return build(name, [Placed(block, "", {name: ""})], {})


FROM_ONE = layout("one", rule("a.{i}", "w.{i}"))
FROM_ZERO = layout("zero", rule("b.{i}", "w.{i}", plus=-1.0))
STACKED = layout("stacked", rule("c", "w.{i}", over=("i",), plus=-1.0))


def filled(step: Step, values: torch.Tensor, to: str, window: int) -> torch.Tensor:
    """What the engine writes for a step whose sources all hold `values`, window by window."""
    path = Path(step.tensor)
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    dtype = BY_TORCH_NAME[str(values.dtype).removeprefix("torch.")]
    chunk = StoredChunk((0,), (N,), path, 0)
    stored = {name: StoredTensor(name, dtype, (N,), (chunk,)) for name in step.sources}
    extent = TensorExtent(step, stored, BY_TORCH_NAME[to], (0,) * len(step.shape), step.shape)
    out: NDArray[np.uint8] = np.full(extent.nbytes, 0xA5, dtype=np.uint8)
    reader = Reader()
    for at in range(0, extent.nbytes, window):
        end = min(at + window, extent.nbytes)
        extent.fill(reader, out[at:end], at, end)
    reader.close()
    return torch.from_numpy(out).view(BY_TORCH_NAME[to].torch()).reshape(step.shape)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("was", FLOATS)
@pytest.mark.parametrize(("source", "target", "by"), [(FROM_ONE, FROM_ZERO, -1.0), (FROM_ZERO, FROM_ONE, 1.0)])
def test_values_are_shifted_in_double_precision(
    source: Layout, target: Layout, by: float, was: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = torch.randn(N, generator=torch.Generator().manual_seed(0)).to(BY_TORCH_NAME[was].torch())
    wanted = (values.double() + by).to(BY_TORCH_NAME[to].torch())
    step = make_plan(source, target).steps[1]
    assert step.shift == by
    assert torch.equal(filled(step, values, to, 1000), wanted)


def test_parts_of_a_stack_are_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = torch.randn(N, generator=torch.Generator().manual_seed(0))
    (step,) = make_plan(FROM_ONE, STACKED).steps
    assert torch.equal(filled(step, values, "float64", 777), (values.double() - 1).expand(2, N))


def test_equal_conventions_copy_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what no sum would give back: not-a-number with a payload, and a negative zero."""
    monkeypatch.chdir(tmp_path)
    values = torch.full((N,), -0.0)
    values.view(torch.int32)[1] = 0x7FC12345
    for target in (FROM_ZERO, STACKED):
        step = make_plan(FROM_ZERO, target).steps[0]
        assert step.shift == 0
        assert torch.equal(
            filled(step, values, "float32", 512).view(torch.int32)[..., :2].flatten()[:2], values.view(torch.int32)[:2]
        )


def test_a_shift_is_named() -> None:
    assert [s.op for s in make_plan(FROM_ONE, FROM_ZERO).steps] == ["rename -1", "rename -1"]
    assert [s.op for s in make_plan(STACKED, FROM_ONE).steps] == ["unstack +1", "unstack +1"]
    assert [s.op for s in make_plan(FROM_ZERO, STACKED).steps] == ["stack 2"]


def test_sources_must_count_from_one_number() -> None:
    mixed = layout("mixed", rule("a.0", "w.0"), rule("a.1", "w.1", plus=-1.0))
    (step,) = make_plan(mixed, STACKED).steps
    with pytest.raises(ValueError, match=r"c: its sources count from \[-1.0, 0.0\]"):
        _ = step.shift


def test_known_bytes_need_no_source() -> None:
    (step,) = make_plan(FROM_ONE, STACKED).steps
    whole = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    known = whole.numpy().tobytes()
    extent = TensorExtent(step, {}, BY_TORCH_NAME["float32"], (1, 2), (1, 10), known)
    out: NDArray[np.uint8] = np.zeros(20, dtype=np.uint8)
    extent.fill(Reader(), out, 8, 28)
    assert out.tobytes() == whole[1, 4:9].numpy().tobytes()
