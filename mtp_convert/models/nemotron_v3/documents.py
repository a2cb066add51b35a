"""Rows that hold several documents: where each begins and ends, and how a layer keeps them apart.

Symbols: B rows, S positions of a row, K documents of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypedDict

import torch
from torch import Tensor

from mtp_convert.models.packed_rows import packed_seq_idx


class PackedArguments(TypedDict, total=False):
    """The keywords by which callers describe packed rows; the first four are explained at `packed_seq_idx`.

    Layouts do not differ here, so `qkv_format` and `max_seqlen` change nothing. `cp_size` must be 1.
    """

    seq_idx: Tensor | None
    _packed_seq_ids: Tensor | None
    cu_seqlens_padded: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: Tensor | int | None
    qkv_format: str | None
    cp_size: int
    cp_rank: int


@dataclass(frozen=True)
class Documents:
    """Documents of B rows: `seq_idx` int32 [B, S] and, row by row, their borders from 0 to S."""

    seq_idx: Tensor
    borders: tuple[tuple[int, ...], ...]

    @classmethod
    def from_arguments(cls, given: PackedArguments, rows: int, length: int, device: torch.device) -> Self | None:
        """What `given` describes; None if every row is one document.

        Raises ValueError if it does not fit rows of this number and length, or if documents interleave; TypeError for
        words that are none of `PackedArguments`.
        """
        if unknown := sorted(given.keys() - PackedArguments.__annotations__.keys()):
            raise TypeError(f"unknown arguments of a forward pass: {', '.join(unknown)}")
        if given.get("cp_size", 1) != 1:
            raise ValueError(f"cp_size is {given['cp_size']}, but a row cannot be split over ranks here: expected 1")
        seq_idx = packed_seq_idx(given, rows, length, device=device)
        if seq_idx is None:
            return None
        seq_idx = seq_idx.int()
        borders = tuple(_borders(row) for row in seq_idx.tolist())
        return None if all(len(row) == 2 for row in borders) else cls(seq_idx, borders)

    def each(self, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`run` on every document alone: of `tensors` [B, S, ...] it gets [1, length, ...], and returns the same."""
        rows = []
        for row, borders in enumerate(self.borders):
            pieces = [run(*(t[row : row + 1, a:b] for t in tensors)) for a, b in pairwise(borders)]
            rows.append(torch.cat(pieces, dim=1))
        return torch.cat(rows)

    def last_positions(self) -> Tensor:
        """Bool [B, S], true at the last position of every document."""
        last = torch.ones_like(self.seq_idx, dtype=torch.bool)
        last[:, :-1] = self.seq_idx[:, 1:] != self.seq_idx[:, :-1]
        return last


def _borders(numbers: list[int]) -> tuple[int, ...]:
    """[0, .., S] around runs of equal numbers."""
    changes = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]
    starts = [numbers[i] for i in (0, *changes)]
    if again := sorted({n for n in starts if n != 0 and starts.count(n) > 1}):  # 0 is padding, also between documents
        raise ValueError(f"documents {again} go on behind another one, expected each in one piece")
    return (0, *changes, len(numbers))
