"""Which document every position of a packed row belongs to, from any of the descriptions that callers use.

Symbols: B rows, S positions of a row, K documents of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def packed_seq_idx(given: Mapping[str, Any], rows: int, length: int, *, device: torch.device) -> Tensor | None:
    """Document numbers [B, S] by the first description that `given` holds; None if it holds none.

    In this order: `seq_idx` or `_packed_seq_ids` [B, S], or [S] of a single row: equal numbers mark one document;
    `seq_lens_padded` [B, K]: lengths that add up to S; `cu_seqlens_padded` or `cu_seqlens` [K + 1] or [1, K + 1]:
    borders of a single row, rising from 0. Negative lengths and borders are fill, a single border says nothing.
    `cu_seqlens` has to end at S; what lies behind `cu_seqlens_padded` is one more document.

    Raises:
        ValueError: the description does not fit rows of this number and length.
    """
    for name, read in _READERS.items():
        value = given.get(name)
        if value is not None:
            return read(name, torch.as_tensor(value, device=device), rows, length)
    return None


def seq_idx_of_labels(labels: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The document of every label, of the shape of `labels`; the arguments are those of `calculate_mtp_loss`."""
    if seq_idx is None and cu_seqlens is None:
        return torch.zeros_like(labels)
    if seq_idx is None:
        assert cu_seqlens is not None
        if cu_seqlens.dim() != 1 and (cu_seqlens.dim() != 2 or cu_seqlens.shape[0] != 1):
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [K + 1] or [1, K + 1]")
        seq_idx = seq_idx_from_borders(_without_fill(cu_seqlens.to(labels.device)), labels.shape[-1])
    if seq_idx.dim() == 1 and labels.dim() == 2:
        seq_idx = seq_idx.expand(labels.shape[0], -1)
    if seq_idx.dim() == 2 and seq_idx.shape[0] == 1 and labels.dim() == 1:
        seq_idx = seq_idx.squeeze(0)
    if seq_idx.shape != labels.shape:
        raise ValueError(
            f"seq_idx.shape {tuple(seq_idx.shape)} does not match labels.shape {tuple(labels.shape)}; "
            "a pipeline has to cut it into microbatches too"
        )
    return seq_idx.to(labels.device)


def seq_idx_from_borders(borders: Tensor, length: int) -> Tensor:
    """Document numbers [S] from borders [K + 1]; positions behind the last border get one of their own."""
    places = torch.arange(length, device=borders.device)
    return torch.searchsorted(borders[1:].long(), places, right=True)


def same_document(seq_idx: Tensor, distance: int) -> Tensor:
    """Whether the place `distance` ahead exists and belongs to the same document; `seq_idx` [.., S] -> bool [.., S]."""
    length = seq_idx.size(-1)
    width = min(distance, length)
    same = torch.zeros_like(seq_idx, dtype=torch.bool)
    same[..., : length - width] = seq_idx[..., width:] == seq_idx[..., : length - width]
    return same


def _from_numbers(name: str, numbers: Tensor, rows: int, length: int) -> Tensor:
    if rows == 1 and numbers.dim() == 1:
        numbers = numbers.unsqueeze(0)
    if numbers.shape != (rows, length):
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}, expected {(rows, length)}")
    return numbers


def _from_lengths(name: str, lengths: Tensor, rows: int, length: int) -> Tensor:
    if lengths.dim() != 2 or lengths.size(0) != rows:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}, expected [{rows}, documents]")
    ends = lengths.clamp(min=0).cumsum(1)  # [B, K]; a length below 0 leaves the end where it was
    if (ends[:, -1] != length).any():
        raise ValueError(f"{name} must cover exactly the input sequence length {length}, got {ends[:, -1].tolist()}")
    places = torch.arange(length, device=lengths.device).expand(rows, -1).contiguous()
    return torch.searchsorted(ends, places, right=True)


def _from_borders(name: str, borders: Tensor, rows: int, length: int) -> Tensor | None:
    if rows != 1:
        raise ValueError(f"{name} describes one row, but the batch has {rows}; give seq_idx [B, S]")
    borders = _without_fill(borders)
    if borders.numel() < 2:
        return None
    padded = name == "cu_seqlens_padded"
    ends_well = borders[-1] <= length if padded else borders[-1] == length
    if borders[0] != 0 or (borders.diff() < 0).any() or not ends_well:
        expected = f"borders that rise from 0 to {'at most ' if padded else ''}{length}"
        hint = "" if padded else "; for padded rows provide cu_seqlens_padded or seq_idx"
        raise ValueError(f"{name} is {borders.tolist()}, expected {expected}{hint}")
    return seq_idx_from_borders(borders, length).unsqueeze(0)


def _without_fill(borders: Tensor) -> Tensor:
    borders = borders.flatten()
    return borders[borders >= 0]


_READERS: dict[str, Callable[[str, Tensor, int, int], Tensor | None]] = {
    "seq_idx": _from_numbers,
    "_packed_seq_ids": _from_numbers,
    "seq_lens_padded": _from_lengths,
    "cu_seqlens_padded": _from_borders,
    "cu_seqlens": _from_borders,
}
