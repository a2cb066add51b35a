"""Shift a token sequence, also when it is packed or cut over context parallel ranks.

Context parallelism of size N cuts a sequence into 2N chunks; rank r holds chunk r and, behind it, chunk 2N - 1 - r, so
that all ranks have equal work under a causal mask. Packed sequences are cut one by one. A roll to the left gives the
end of every chunk the beginning of the chunk that follows it in the sequence. For the first chunk of a rank that lies
on the next rank (on the last rank: in its own second chunk), for the second chunk on the previous rank (on rank 0:
nowhere, the sequence ends there).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_convert.models import mtp_inputs
from mtp_convert.models.megatron.groups import Group
from mtp_convert.models.megatron.packed import PackedSeqParams

Span = tuple[int, int]  # first position, position after the last


@overload
def roll_tensor(
    tensor: Tensor,
    shifts: int = ...,
    dims: int = ...,
    cp_group: Group | None = ...,
    packed_seq_params: PackedSeqParams | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def roll_tensor(
    tensor: None,
    shifts: int = ...,
    dims: int = ...,
    cp_group: Group | None = ...,
    packed_seq_params: PackedSeqParams | None = ...,
) -> tuple[None, None]: ...
def roll_tensor(
    tensor: Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: Group | None = None,
    packed_seq_params: PackedSeqParams | None = None,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Shift `tensor` by `shifts` along `dims` and fill what comes in from outside the sequence with zeros.

    Returns the shifted tensor and the sum of what this rank holds of it; the input stays as it is. None gives
    (None, None). With a `cp_group` of more than one rank, or packed sequences, only shifts to the left are defined;
    then ValueError says what does not fit.
    """
    if tensor is None:
        return None, None
    if packed_seq_params is not None:
        return _roll_tensor_packed_seq(tensor, shifts, dims, packed_seq_params, cp_group)
    if cp_group is not None and cp_group.size() > 1:
        rolled = _roll_left(tensor, -shifts, dims, [(0, tensor.size(dims))], cp_group)
    else:
        rolled = mtp_inputs.roll_tensor(tensor, shifts, dims)
    return rolled, rolled.sum()


def _roll_tensor_packed_seq(
    tensor: Tensor, shifts: int, dims: int, packed_seq_params: PackedSeqParams, cp_group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Shift every packed sequence by itself; what lies outside all of them stays. See `roll_tensor`."""
    boundaries = packed_seq_params.boundaries
    if boundaries is None:
        raise ValueError("packed sequences need cu_seqlens_q")
    ends: list[int] = boundaries.tolist()
    size = 1 if cp_group is None else cp_group.size()
    length = tensor.size(dims) * size
    if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= length):
        raise ValueError(f"cumulative lengths {ends} do not rise from 0 to the row's {length} tokens at most")
    if uneven := [b - a for a, b in pairwise(ends) if size > 1 and (b - a) % (2 * size)]:
        raise ValueError(f"sequences of {uneven} tokens do not cut into 2 * {size} chunks")
    rolled = _roll_left(tensor, -shifts, dims, [(a // size, b // size) for a, b in pairwise(ends)], cp_group)
    return rolled, rolled.sum()


def _roll_left(tensor: Tensor, width: int, dim: int, spans: list[Span], group: Group | None) -> Tensor:
    """Shift every span of local positions `width` to the left."""
    if width < 1:
        raise ValueError(f"packed or context parallel sequences roll to the left only, got shifts={-width}")
    rolled, spans = tensor.roll(-width, dim), [s for s in spans if s[0] < s[1]]
    outside = _positions(_gaps(spans, tensor.size(dim)), tensor)
    rolled.index_copy_(dim, outside, tensor.index_select(dim, outside))
    if group is None or group.size() == 1:
        rolled.index_fill_(dim, _positions(((max(a, b - width), b) for a, b in spans), tensor), 0)
        return rolled
    first, second = _halves(spans, width)
    heads = (
        tensor.index_select(dim, _positions(((a, a + width) for a, _ in half), tensor)) for half in (first, second)
    )
    for half, incoming in zip((first, second), _exchange(*heads, group=group), strict=True):
        rolled.index_copy_(dim, _positions(((b - width, b) for _, b in half), tensor), incoming)
    return rolled


def _exchange(first: Tensor, second: Tensor, *, group: Group) -> tuple[Tensor, Tensor]:
    """Send the heads of this rank's first and second chunks, get those that follow its first and second chunks.

    All sequences go in one message per neighbour and direction.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"rolling over {group.size()} context ranks needs a torch.distributed process group")
    rank, last = group.rank(), group.size() - 1
    after_first = second if rank == last else torch.empty_like(first)
    after_second = torch.empty_like(second) if rank else torch.zeros_like(second)
    messages = []
    if rank:
        before = dist.get_global_rank(group, rank - 1)
        messages += [dist.P2POp(dist.isend, first, before, group), dist.P2POp(dist.irecv, after_second, before, group)]
    if rank != last:
        behind = dist.get_global_rank(group, rank + 1)
        messages += [dist.P2POp(dist.irecv, after_first, behind, group), dist.P2POp(dist.isend, second, behind, group)]
    for request in dist.batch_isend_irecv(messages):
        request.wait()
    return after_first, after_second


def _halves(spans: list[Span], width: int) -> tuple[list[Span], list[Span]]:
    """The first and the second chunk of every span; ValueError if they differ or are shorter than the shift."""
    wrong = [b - a for a, b in spans if (b - a) % 2 or (b - a) // 2 < width]
    if wrong:
        raise ValueError(f"a rank's {wrong} tokens of a sequence are not two chunks of at least {width} each")
    middles = [(a + b) // 2 for a, b in spans]
    firsts = [(a, middle) for (a, _), middle in zip(spans, middles, strict=True)]
    return firsts, [(middle, b) for (_, b), middle in zip(spans, middles, strict=True)]


def _gaps(spans: list[Span], length: int) -> list[Span]:
    """What lies before the first and behind the last span; spans follow each other without holes."""
    return [(0, spans[0][0]), (spans[-1][1], length)] if spans else [(0, length)]


def _positions(spans: Iterable[Span], like: Tensor) -> Tensor:
    """All positions of the spans, as an index on the device of `like`."""
    return torch.tensor([p for a, b in spans for p in range(a, b)], dtype=torch.long, device=like.device)
