"""Move ids, positions and labels to the left, one place per MTP depth, also where rows hold packed documents.

Symbols: B rows, S positions of a row, D depths, K documents.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def roll_tensor(t: Tensor, shifts: int = -1, dim: int = -1) -> Tensor:
    """A copy of `t` moved by `shifts` places along `dim`; places that nothing moves into hold 0 (or False).

    Negative `shifts` move to the left. A shift by the whole length or more leaves only zeros.
    """
    length = t.size(dim)
    width = min(abs(shifts), length)
    shape = list(t.shape)
    shape[dim] = width
    zeros = t.new_zeros(shape)
    if shifts < 0:
        return torch.cat((t.narrow(dim, width, length - width), zeros), dim)
    return torch.cat((zeros, t.narrow(dim, 0, length - width)), dim)


def shift_packed_tensor(
    tensor: Tensor,
    *,
    depth: int,
    seq_idx: Tensor | None = None,
    fill_value: float = 0,
    batch_dim: int = 0,
    seq_dim: int = 1,
) -> Tensor:
    """What lies `depth` places ahead in the same document, `fill_value` where the document ends before that.

    Args:
        tensor: B rows along `batch_dim`, S positions along `seq_dim`, any other dimensions.
        depth: places to look ahead, 1 or more.
        seq_idx: [B, S], equal numbers mark one document; None: every row is one.
        fill_value: for positions without such a place.
        batch_dim: dimension of the rows.
        seq_dim: dimension of the positions.

    Raises:
        ValueError: `tensor` has fewer than 2 dimensions, `depth` is not positive, both dimensions are the same, or
            `seq_idx` is not [B, S].
    """
    if tensor.dim() < 2:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}, expected at least 2 dimensions")
    if depth <= 0:
        raise ValueError(f"depth must be positive, got {depth}")
    batch_dim, seq_dim = batch_dim % tensor.dim(), seq_dim % tensor.dim()
    if batch_dim == seq_dim:
        raise ValueError(f"batch_dim and seq_dim must differ, got {batch_dim} twice")
    rows, length = tensor.size(batch_dim), tensor.size(seq_dim)
    if seq_idx is None:
        seq_idx = torch.zeros(rows, length, dtype=torch.int8, device=tensor.device)
    if seq_idx.shape != (rows, length):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(rows, length)}")
    same = same_document(seq_idx, depth)  # [B, S]
    shape = [1] * tensor.dim()
    shape[batch_dim], shape[seq_dim] = rows, length
    keep = (same if batch_dim < seq_dim else same.T).reshape(shape)
    return roll_tensor(tensor, -depth, seq_dim).masked_fill(~keep, fill_value)


def same_document(seq_idx: Tensor, distance: int) -> Tensor:
    """Whether the place `distance` ahead exists and belongs to the same document; `seq_idx` [.., S] -> bool [.., S]."""
    length = seq_idx.size(-1)
    width = min(distance, length)
    same = torch.zeros_like(seq_idx, dtype=torch.bool)
    same[..., : length - width] = seq_idx[..., width:] == seq_idx[..., : length - width]
    return same


def seq_idx_from_borders(borders: Tensor, length: int) -> Tensor:
    """Document number of each of `length` positions, [S]; `borders` [K + 1] rises from 0 (a `cu_seqlens`).

    Positions behind the last border get a number of their own.
    """
    places = torch.arange(length, device=borders.device)
    return torch.searchsorted(borders[1:].long(), places, right=True)


def document_index(labels: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The document of every label, of the shape of `labels`; the arguments are those of `calculate_mtp_loss`."""
    if seq_idx is None and cu_seqlens is None:
        return torch.zeros_like(labels)
    if seq_idx is None:
        assert cu_seqlens is not None
        if cu_seqlens.dim() != 1 and (cu_seqlens.dim() != 2 or cu_seqlens.shape[0] != 1):
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [K + 1] or [1, K + 1]")
        borders = cu_seqlens[cu_seqlens >= 0].to(labels.device)
        seq_idx = seq_idx_from_borders(borders, labels.shape[-1])
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


def depth_targets(labels: Tensor, documents: Tensor, depth: int, ignored: int) -> Tensor:
    """The labels of `depth`, moved and masked; of the shape of `labels`."""
    moved = roll_tensor(labels, -depth - 1)
    return moved.masked_fill(~same_document(documents, depth + 1), ignored)


def checked_targets(
    targets: Sequence[Tensor], labels: Tensor, num_depths: int, excluded: Mapping[str, Tensor | None]
) -> Sequence[Tensor]:
    """`targets`, one tensor of the shape of `labels` per depth; ValueError names everything that is wrong.

    `excluded` are arguments that targets made by the caller leave no use for.
    """
    problems = [f"cannot be combined with {name}" for name, value in excluded.items() if value is not None]
    if len(targets) != num_depths:
        problems.append(f"has {len(targets)} entries, expected {num_depths}")
    problems += [
        f"depth {depth} has shape {tuple(target.shape)}, which does not match labels {tuple(labels.shape)}"
        for depth, target in enumerate(targets)
        if target.shape != labels.shape
    ]
    if problems:
        raise ValueError("mtp_per_depth_targets " + "; ".join(problems))
    return targets


@dataclass(frozen=True)
class MTPContextParallelInputs:
    """What every depth reads, in order of the whole sequence; entry k of a tuple belongs to depth k.

    Attributes:
        input_ids: each [B, S]; 0 where there is no token.
        position_ids: each [B, S] or [axes, B, S]; 0 where there is no token.
        targets: each [B, S]; `ignore_index` where there is nothing to predict.
        valid_masks: each bool [B, S]; whether `input_ids` holds a token of the same document.
        position_ids_seq_dim: the dimension of `position_ids` that is S, 1 or 2.
    """

    input_ids: tuple[Tensor, ...]
    position_ids: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    valid_masks: tuple[Tensor, ...]
    position_ids_seq_dim: int


def prepare_mtp_context_parallel_inputs(
    batch: MutableMapping[str, Any], *, num_depths: int, ignore_index: int = -100
) -> MTPContextParallelInputs:
    """Shift ids, positions and labels for every depth before context parallelism cuts the sequence.

    A rank that holds a piece of the sequence cannot see the token that follows its piece, so the shift comes first;
    the shifted tensors are then cut like any other. Nothing crosses the border of a packed document. Borders come
    from the first of these that `batch` has: `seq_idx` or `_packed_seq_ids` [B, S]; `seq_lens_padded` [B, K]
    (negative entries are padding); `cu_seqlens_padded` or `cu_seqlens` [K + 1] or [1, K + 1] of a single row.

    `batch["position_ids"]` is written if it was missing (0, 1, .. S - 1 in every row) or shared, [1, S] (then
    expanded to all rows).

    Args:
        batch: holds `input_ids` [B, S] and `labels` [B, S] (label t is token t + 1), perhaps `position_ids`
            [B, S], [1, S] or [axes, B, S], and borders.
        num_depths: D, 1 or more.
        ignore_index: the label that counts for nothing.

    Raises:
        ValueError: a tensor is missing, or shapes or borders do not fit.
    """
    if num_depths <= 0:
        raise ValueError(f"num_depths must be positive, got {num_depths}")
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        missing = [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), Tensor)]
        raise ValueError(f"the batch has no tensor {' and no tensor '.join(missing)}")
    if ids.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"input_ids and labels have shapes {tuple(ids.shape)} and {tuple(labels.shape)}, expected one [B, S]"
        )
    seq_idx = _document_index(batch, ids)
    positions = _position_ids(batch.get("position_ids"), ids)
    batch["position_ids"] = positions
    seq_dim = positions.dim() - 1
    depths = range(1, num_depths + 1)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return MTPContextParallelInputs(
        input_ids=tuple(shift_packed_tensor(ids, depth=d, seq_idx=seq_idx) for d in depths),
        position_ids=tuple(
            shift_packed_tensor(positions, depth=d, seq_idx=seq_idx, batch_dim=seq_dim - 1, seq_dim=seq_dim)
            for d in depths
        ),
        targets=tuple(shift_packed_tensor(labels, depth=d, seq_idx=seq_idx, fill_value=ignore_index) for d in depths),
        valid_masks=tuple(shift_packed_tensor(everywhere, depth=d, seq_idx=seq_idx) for d in depths),
        position_ids_seq_dim=seq_dim,
    )


def _position_ids(given: Tensor | None, ids: Tensor) -> Tensor:
    rows, length = ids.shape
    if given is None:
        return torch.arange(length, device=ids.device).expand(rows, -1)
    if given.shape == (1, length):
        return given.expand(rows, -1)
    if given.shape != ids.shape and (given.dim() != 3 or given.shape[1:] != ids.shape):
        expected = f"{(rows, length)}, {(1, length)} or [axes, {rows}, {length}]"
        raise ValueError(f"position_ids has shape {tuple(given.shape)}, expected {expected}")
    return given


def _document_index(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """The batch's document numbers [B, S]; None if it says nothing of documents."""
    for name in ("seq_idx", "_packed_seq_ids"):
        seq_idx = batch.get(name)
        if isinstance(seq_idx, Tensor):
            if seq_idx.shape != ids.shape:
                raise ValueError(f"{name} has shape {tuple(seq_idx.shape)}, expected {tuple(ids.shape)}")
            return seq_idx.to(ids.device)
    lengths = batch.get("seq_lens_padded")
    if isinstance(lengths, Tensor):
        return _from_lengths(lengths.to(ids.device), ids)
    for name in ("cu_seqlens_padded", "cu_seqlens"):
        borders = batch.get(name)
        if isinstance(borders, Tensor):
            return _from_borders(name, borders.to(ids.device), ids)
    return None


def _from_lengths(lengths: Tensor, ids: Tensor) -> Tensor:
    """`lengths` [B, K] of the documents, negative for none -> [B, S]."""
    rows, length = ids.shape
    if lengths.dim() != 2 or lengths.size(0) != rows:
        raise ValueError(f"seq_lens_padded has shape {tuple(lengths.shape)}, expected [{rows}, documents]")
    ends = lengths.clamp(min=0).cumsum(1)  # [B, K]; a length below 0 leaves the end where it was
    if (ends[:, -1] != length).any():
        totals = ends[:, -1].tolist()
        raise ValueError(f"seq_lens_padded must cover exactly the input sequence length {length}, got {totals}")
    places = torch.arange(length, device=ids.device).expand(rows, -1).contiguous()
    return torch.searchsorted(ends, places, right=True)


def _from_borders(name: str, borders: Tensor, ids: Tensor) -> Tensor | None:
    """`borders` [K + 1] or [1, K + 1], negative entries are padding -> [1, S]; None if they enclose no document."""
    rows, length = ids.shape
    if rows != 1:
        raise ValueError(f"{name} describes one row, but the batch has {rows}; give seq_idx [B, S]")
    borders = borders.reshape(-1)
    borders = borders[borders >= 0]
    if borders.numel() < 2:
        return None
    if borders[0] != 0 or (borders.diff() < 0).any():
        raise ValueError(f"{name} is {borders.tolist()}, expected borders that rise from 0")
    if name == "cu_seqlens" and borders[-1] != length:
        raise ValueError(
            f"cu_seqlens ends at {int(borders[-1])}, expected {length}; for padded rows provide cu_seqlens_padded"
        )
    return seq_idx_from_borders(borders, length).unsqueeze(0)
