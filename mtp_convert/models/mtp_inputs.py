"""Move ids, positions and labels to the left, one place per MTP depth, also where rows hold packed documents.

Symbols: B rows, S positions of a row, D depths.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_convert.models.packed_rows import packed_seq_idx, same_document


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


def per_depth_targets(labels: Tensor, documents: Tensor, num_depths: int, ignored: int) -> Iterator[Tensor]:
    """The labels of every depth, moved and masked, each of the shape of `labels`; made one at a time."""
    for ahead in range(1, num_depths + 1):
        yield roll_tensor(labels, -ahead).masked_fill(~same_document(documents, ahead), ignored)


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
    the shifted tensors are then cut like any other. Nothing crosses the border of a packed document; how `batch`
    describes documents is explained at `packed_seq_idx`.

    `batch["position_ids"]` is written if it was missing (0, 1, .. S - 1 in every row) or shared, [1, S] (then
    expanded to all rows).

    Args:
        batch: holds `input_ids` [B, S] and `labels` [B, S] (label t is token t + 1), perhaps `position_ids`
            [B, S], [1, S] or [axes, B, S], and a description of documents.
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
    seq_idx = packed_seq_idx(batch, *ids.shape, device=ids.device)
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
