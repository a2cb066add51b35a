"""roll_tensor against megatron-core's results, and over context parallel ranks against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _gloo import DEPTHS, ROLLS, Results, Roll, reference_rolls
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_convert.models.megatron.groups import Member
from mtp_convert.models.megatron.loss import mtp_depth_targets
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.roll import roll_tensor

REFERENCE = reference_rolls()


def packed(*ends: int) -> PackedSeqParams:
    return PackedSeqParams(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32))


def rolled(tensor: Tensor, shifts: int = -1, packing: PackedSeqParams | None = None) -> list[int]:
    result: list[int] = roll_tensor(tensor, shifts, packed_seq_params=packing)[0].tolist()
    return result


@pytest.mark.parametrize(("roll", "ranks"), [(r, ranks) for r, ranks in REFERENCE if r.cp == 1], ids=str)
def test_one_process_agrees_with_megatron_core(roll: Roll, ranks: list[dict[str, Any]]) -> None:
    whole = roll.whole
    got, total = roll_tensor(whole, -1, roll.dim, Member(), roll.packed)
    assert got.tolist() == ranks[0]["output"]
    assert total.item() == ranks[0]["sum"]
    assert torch.equal(whole, roll.whole)  # the input is left alone


@pytest.mark.parametrize("number", range(len(ROLLS)), ids=lambda n: str(ROLLS[n]))
def test_context_parallel_ranks_hold_their_part_of_the_rolled_sequence(gloo: Results, number: int) -> None:
    roll = ROLLS[number]
    whole, total = roll_tensor(roll.whole, roll.shifts, roll.dim, None, roll.packed)
    sums = []
    for rank in range(roll.cp):
        got, part = gloo[rank]["rolls"][number]
        assert torch.equal(got, roll.cut(whole, rank)), rank
        sums.append(part)
    assert sum(sums) == total


@pytest.mark.parametrize(("roll", "ranks"), [(r, ranks) for r, ranks in REFERENCE if r.cp > 1], ids=str)
def test_context_parallel_ranks_agree_with_megatron_core(
    gloo: Results, roll: Roll, ranks: list[dict[str, Any]]
) -> None:
    for rank, expected in enumerate(ranks):
        assert roll.cut(roll.whole, rank).tolist() == expected["input"]
        got, total = gloo[rank]["rolls"][ROLLS.index(roll)]
        assert got.tolist() == expected["output"]
        assert total.item() == expected["sum"]


def test_depth_targets_of_context_parallel_ranks(gloo: Results) -> None:
    whole = DEPTHS.whole
    expected = mtp_depth_targets(whole, (whole % 3 > 0).float(), 2, packed_seq_params=DEPTHS.packed)
    for depth, target in enumerate(expected):
        ranks = [gloo[rank]["targets"][depth] for rank in range(DEPTHS.cp)]
        for rank, (labels, mask, _) in enumerate(ranks):
            assert torch.equal(labels, DEPTHS.cut(target.labels, rank))
            assert torch.equal(mask, DEPTHS.cut(target.loss_mask, rank))
        assert sum(tokens for _, _, tokens in ranks) == target.num_tokens


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [(-1, [2, 3, 4, 0]), (-3, [4, 0, 0, 0]), (-4, [0] * 4), (-9, [0] * 4), (2, [0, 0, 1, 2]), (0, [1, 2, 3, 4])],
)
def test_what_comes_in_is_zero_whatever_the_shift(shifts: int, expected: list[int]) -> None:
    assert rolled(torch.tensor([1, 2, 3, 4]), shifts) == expected


def test_nothing_rolls_to_nothing() -> None:
    assert roll_tensor(None) == (None, None)


def test_gradients_pass() -> None:
    tensor = torch.arange(3.0, requires_grad=True)
    (torch.tensor([1.0, 10, 100]) * roll_tensor(tensor)[0]).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [0, 1, 10]


def test_padded_sequences_roll_inside_their_padding() -> None:
    both = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 2, 5]), cu_seqlens_q_padded=torch.tensor([0, 4, 8]))
    assert rolled(torch.tensor([1, 2, 0, 0, 3, 4, 5, 0]), packing=both) == [2, 0, 0, 0, 4, 5, 0, 0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 3))
def test_packed_sequences_roll_like_single_ones(lengths: list[int], width: int, rest: int) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    row = torch.arange(1, 1 + sum(lengths) + rest)
    pieces = [roll_tensor(piece, -width)[0] for piece in row[: sum(lengths)].split(lengths)]
    expected = torch.cat([*pieces, row[sum(lengths) :]])
    assert torch.equal(roll_tensor(row, -width, packed_seq_params=PackedSeqParams(cu_seqlens_q=ends))[0], expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"packed_seq_params": PackedSeqParams()}, "cu_seqlens_q"),
        ({"packed_seq_params": packed(0, 8, 4)}, "do not rise"),
        ({"packed_seq_params": packed(0, 9)}, "8 tokens at most"),
        ({"packed_seq_params": packed(0, 8), "shifts": 1}, "to the left only, got shifts=1"),
        ({"cp_group": Member(0, 2), "shifts": 2}, "to the left only, got shifts=2"),
        ({"packed_seq_params": packed(0, 6, 16), "cp_group": Member(0, 2)}, r"\[6, 10\] tokens do not cut into 2 \* 2"),
        ({"cp_group": Member(0, 2), "shifts": -5}, r"\[8\] tokens .* at least 5"),
        ({"cp_group": Member(0, 2)}, "2 context ranks needs a torch.distributed process group"),
    ],
)
def test_what_cannot_be_rolled_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roll_tensor(torch.arange(8), **kwargs)


def test_an_odd_number_of_local_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7\] tokens of a sequence are not two chunks"):
        roll_tensor(torch.arange(7), cp_group=Member(0, 2))


def test_sequence_numbers_of_packed_tokens() -> None:
    numbers = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 2, 2, 5]), total_tokens=7).seq_idx
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 2, 2, 2, 3, 3]]
    assert numbers.dtype == torch.int32
    assert PackedSeqParams(cu_seqlens_q=torch.tensor([0, 2])).seq_idx is None
