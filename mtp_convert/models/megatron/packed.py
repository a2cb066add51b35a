"""Sequences of different lengths behind one another in one row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mtp_convert.models.megatron.groups import Group
from mtp_convert.models.packed_rows import seq_idx_from_borders


@dataclass(frozen=True, eq=False)
class PackedSeqParams:
    """Where each packed sequence begins and ends, under Megatron's names.

    `cu_seqlens_*` [N + 1] are the cumulative lengths of N sequences, in tokens of the whole row (before it is cut over
    context ranks). With `*_padded` every sequence is followed by padding, and these are the lengths including it.
    """

    qkv_format: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None
    cp_group: Group | None = None
    total_tokens: int | None = None

    @property
    def boundaries(self) -> Tensor | None:
        """Where sequences begin and end in the row, padding included."""
        return self.cu_seqlens_q if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded

    @cached_property
    def seq_idx(self) -> Tensor | None:
        """Number of the sequence of every token [1, total_tokens], int32; tokens after the last sequence count as one
        more. None if `total_tokens` or the lengths are not known.
        """
        if self.boundaries is None or self.total_tokens is None:
            return None
        return seq_idx_from_borders(self.boundaries, self.total_tokens).int()[None]
