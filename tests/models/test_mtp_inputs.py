"""Moving ids, positions and labels: by hand and against slow loops."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_convert.models.mtp import prepare_mtp_context_parallel_inputs, roll_tensor, shift_packed_tensor

# --- roll_tensor, shift_packed_tensor


@pytest.mark.parametrize(
    ("shifts", "dim", "expected"),
    [
        (-1, -1, [[2, 3, 0], [5, 6, 0]]),
        (-2, 1, [[3, 0, 0], [6, 0, 0]]),
        (1, -1, [[0, 1, 2], [0, 4, 5]]),
        (-1, 0, [[4, 5, 6], [0, 0, 0]]),
        (0, -1, [[1, 2, 3], [4, 5, 6]]),
        (-3, -1, [[0, 0, 0], [0, 0, 0]]),
        (9, -1, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_roll_tensor_fills_with_zeros(shifts: int, dim: int, expected: list[list[int]]) -> None:
    t = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rolled = roll_tensor(t, shifts=shifts, dim=dim)
    assert rolled.tolist() == expected
    assert t.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert rolled.data_ptr() != t.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.bfloat16])
def test_roll_tensor_keeps_the_dtype(dtype: torch.dtype) -> None:
    rolled = roll_tensor(torch.ones(3, dtype=dtype))
    assert rolled.dtype == dtype
    assert torch.equal(rolled, torch.tensor([1, 1, 0]).to(dtype))
    assert roll_tensor(torch.ones(2, 0, dtype=dtype)).shape == (2, 0)


def test_roll_tensor_is_differentiable() -> None:
    t = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: roll_tensor(x, -2), (t,))


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.integers(0, 2), min_size=2, max_size=12).filter(lambda d: len(d) % 2 == 0),
    depth=st.integers(1, 8),
    extra=st.booleans(),
    turned=st.booleans(),
)
def test_shift_packed_tensor_against_a_loop(documents: list[int], depth: int, extra: bool, turned: bool) -> None:
    seq_idx = torch.tensor(documents).view(2, -1)
    rows, length = seq_idx.shape
    tensor = torch.arange(1, 1 + rows * length * 3).view(rows, length, 3)
    if not extra:
        tensor = tensor[..., 0]
    expected = torch.full_like(tensor, -7)
    for b in range(rows):
        for s in range(length - depth):
            if seq_idx[b, s] == seq_idx[b, s + depth]:
                expected[b, s] = tensor[b, s + depth]
    if turned:
        tensor, expected = tensor.transpose(0, 1), expected.transpose(0, 1)
    dims = {"batch_dim": 1, "seq_dim": 0} if turned else {"seq_dim": -2 if extra else -1}
    assert torch.equal(shift_packed_tensor(tensor, depth=depth, seq_idx=seq_idx, fill_value=-7, **dims), expected)


def test_shift_packed_tensor_without_documents() -> None:
    assert shift_packed_tensor(torch.tensor([[1, 2, 3]]), depth=2, fill_value=9).tolist() == [[3, 9, 9]]


@pytest.mark.parametrize(
    ("tensor", "kwargs", "message"),
    [
        (torch.zeros(3), {"depth": 1}, "at least 2 dimensions"),
        (torch.zeros(2, 3), {"depth": 0}, "depth must be positive, got 0"),
        (torch.zeros(2, 3), {"depth": 1, "seq_dim": -2}, "batch_dim and seq_dim must differ"),
        (torch.zeros(2, 3), {"depth": 1, "seq_idx": torch.zeros(3)}, r"seq_idx has shape \(3,\), expected \(2, 3\)"),
    ],
)
def test_shift_packed_tensor_refuses(tensor: Tensor, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shift_packed_tensor(tensor, **kwargs)


# --- prepare_mtp_context_parallel_inputs

PACKED = {
    "input_ids": torch.tensor([[10, 11, 12, 20, 21, 22]]),
    "labels": torch.tensor([[11, 12, -100, 21, 22, -100]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
}
BORDERS = {
    "seq_idx": torch.tensor([[4, 4, 4, 2, 2, 2]]),
    "_packed_seq_ids": torch.tensor([[1, 1, 1, 2, 2, 2]]),
    "seq_lens_padded": torch.tensor([[3, 3, -1000]]),
    "cu_seqlens_padded": torch.tensor([0, 3], dtype=torch.int32),  # what lies behind is one more document
    "cu_seqlens": torch.tensor([[0, 3, 6, -1000]]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_prepared_inputs_stay_inside_documents(name: str) -> None:
    prepared = prepare_mtp_context_parallel_inputs(PACKED | {name: BORDERS[name]}, num_depths=2)
    assert [t.tolist() for t in prepared.input_ids] == [[[11, 12, 0, 21, 22, 0]], [[12, 0, 0, 22, 0, 0]]]
    assert [t.tolist() for t in prepared.position_ids] == [[[1, 2, 0, 1, 2, 0]], [[2, 0, 0, 2, 0, 0]]]
    assert [t.tolist() for t in prepared.targets] == [[[12, -100, -100, 22, -100, -100]], [[-100] * 6]]
    assert [t.int().tolist() for t in prepared.valid_masks] == [[[1, 1, 0, 1, 1, 0]], [[1, 0, 0, 1, 0, 0]]]
    assert prepared.position_ids_seq_dim == 1


def test_prepared_inputs_of_plain_rows() -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([[2, 3, 9], [5, 6, 9]])}
    prepared = prepare_mtp_context_parallel_inputs(batch, num_depths=1, ignore_index=-1)
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert prepared.position_ids[0].tolist() == [[1, 2, 0], [1, 2, 0]]
    assert prepared.targets[0].tolist() == [[3, 9, -1], [6, 9, -1]]


def test_prepared_inputs_expand_shared_positions() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2], [4, 5]]),
        "labels": torch.tensor([[2, 9], [5, 9]]),
        "position_ids": torch.tensor([[3, 4]]),
    }
    prepared = prepare_mtp_context_parallel_inputs(batch, num_depths=1)
    assert batch["position_ids"].tolist() == [[3, 4], [3, 4]]
    assert prepared.position_ids[0].tolist() == [[4, 0], [4, 0]]


def test_prepared_inputs_shift_every_axis_of_positions() -> None:
    axes = torch.tensor([0, 10, 20]).view(3, 1, 1) + PACKED["position_ids"]  # [3, 1, S]
    batch = PACKED | {"position_ids": axes, "seq_idx": BORDERS["seq_idx"]}
    prepared = prepare_mtp_context_parallel_inputs(batch, num_depths=1)
    assert prepared.position_ids_seq_dim == 2
    assert prepared.position_ids[0][:, 0].tolist() == [
        [1, 2, 0, 1, 2, 0],
        [11, 12, 0, 11, 12, 0],
        [21, 22, 0, 21, 22, 0],
    ]


def test_prepared_inputs_take_padded_borders_first() -> None:
    batch = {
        "input_ids": torch.tensor([[10, 11, 12, 0, 20, 21, 22, 0]]),
        "labels": torch.tensor([[11, 12, -100, -100, 21, 22, -100, -100]]),
        "cu_seqlens": torch.tensor([0, 3, 6]),
        "cu_seqlens_padded": torch.tensor([0, 4, 8]),
    }
    prepared = prepare_mtp_context_parallel_inputs(batch, num_depths=1)
    assert prepared.input_ids[0].tolist() == [[11, 12, 0, 0, 21, 22, 0, 0]]


def test_prepared_inputs_take_no_border_from_one_number() -> None:
    prepared = prepare_mtp_context_parallel_inputs(PACKED | {"cu_seqlens": torch.tensor([0, -1000])}, num_depths=1)
    assert prepared.input_ids[0].tolist() == [[11, 12, 20, 21, 22, 0]]


@pytest.mark.parametrize(
    ("change", "depths", "message"),
    [
        ({}, 0, "num_depths must be positive, got 0"),
        ({"labels": None, "input_ids": None}, 1, "no tensor input_ids and no tensor labels"),
        ({"labels": torch.zeros(1, 5)}, 1, r"shapes \(1, 6\) and \(1, 5\)"),
        ({"position_ids": torch.zeros(6)}, 1, r"position_ids has shape \(6,\), expected \(1, 6\)"),
        ({"seq_idx": torch.zeros(2, 3)}, 1, r"seq_idx has shape \(2, 3\), expected \(1, 6\)"),
        ({"seq_lens_padded": torch.tensor([[2, 2]])}, 1, r"must cover exactly the input sequence length 6, got \[4\]"),
        ({"seq_lens_padded": torch.zeros(2, 1, 3)}, 1, r"seq_lens_padded has shape \(2, 1, 3\), expected \[1, doc"),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            1,
            r"\[0, 3\], .* from 0 to 6; for padded rows provide cu_seqlens_padded",
        ),
        ({"cu_seqlens": torch.tensor([1, 6])}, 1, "expected borders that rise from 0"),
        ({"cu_seqlens_padded": torch.tensor([0, 4, 2])}, 1, "expected borders that rise from 0"),
        ({"cu_seqlens_padded": torch.tensor([0, 4, 8])}, 1, r"\[0, 4, 8\], expected .* from 0 to at most 6$"),
        (
            {"input_ids": torch.zeros(2, 6), "labels": torch.zeros(2, 6), "cu_seqlens": torch.tensor([0, 6])},
            1,
            "describes one row, but the batch has 2",
        ),
    ],
)
def test_prepared_inputs_refuse(change: dict[str, Any], depths: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_mtp_context_parallel_inputs(PACKED | change, num_depths=depths)
