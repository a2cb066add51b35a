"""What the layers need to know of a batch besides its hidden states, computed once per forward pass.

Symbols: B rows, S positions of a row, N documents, L length of the longest one, R rotary pairs.

Packed rows are unpacked for attention: every document becomes a row of its own, padded on the right, which no
earlier position can see. So nothing leaks between documents, and compressed windows are cut from each document's
own start, wherever it lies in the row. A document computes what it computes alone, unless its indexer scores entries
exactly alike: which of those `torch.topk` prefers may depend on the length of the row.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from mtp_convert.models.mtp_inputs import roll_tensor
from mtp_convert.models.packed_rows import packed_seq_idx


@dataclass(frozen=True)
class Documents:
    """Where every position of packed rows [B, S] goes when each document is a row of [N, L]."""

    last: Tensor  # [B, S] bool: the last position of a document
    offset: Tensor  # [B, S]: place within the document
    to_rows: Tensor  # [N * L]: source position in B * S; free places repeat position 0
    from_rows: Tensor  # [B * S]: place in N * L
    count: int  # N

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> "Documents":
        """`seq_idx` [B, S]: equal neighbours belong to one document; padding may be one too."""
        first = torch.ones_like(seq_idx, dtype=torch.bool)
        first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        position = torch.arange(seq_idx.numel(), device=seq_idx.device)
        document = first.flatten().cumsum(0) - 1  # [B * S]
        starts = position[first.flatten()]  # [N]
        offset = position - starts[document]
        length = int(offset.max()) + 1
        from_rows = document * length + offset
        to_rows = position.new_zeros(len(starts) * length)
        to_rows[from_rows] = position
        last = first.roll(-1, dims=1)  # the last place of a row meets the first, which begins a document
        return cls(last, offset.view(seq_idx.shape), to_rows, from_rows, len(starts))

    def unpack(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] -> [N, L, ...]."""
        rows = x_BS.flatten(0, 1).index_select(0, self.to_rows)
        return rows.view(self.count, -1, *x_BS.shape[2:])

    def pack(self, x_NL: Tensor) -> Tensor:
        """[N, L, ...] -> [B, S, ...]."""
        return x_NL.flatten(0, 1).index_select(0, self.from_rows).view(*self.last.shape, *x_NL.shape[2:])


@dataclass(frozen=True)
class Batch:
    """One batch as the layers see it; attention fields have the rows of unpacked documents if there are any."""

    position_ids: Tensor  # [B, S], [1, S] or [N, L]
    position_embeddings: dict[str, tuple[Tensor, Tensor]]  # "main", "compress": cos, sin [.., R]
    attention_mask: Tensor  # added to the scores of raw keys: [B, 1, S, S] or [N, 1, L, L]
    documents: Documents | None
    padding_mask: Tensor | None  # [B, S] bool, True where padded
    input_ids: Tensor | None  # [B, S], for layers that route by token id


class BatchArguments(TypedDict, total=False):
    """What a caller says about a batch.

    `attention_mask` [B, S] (0 or False where padded, on the right), or [B or 1, 1, S, S] used as it is: bool (True
    attends) or added to the scores. `padding_mask` [B, S] (True where padded) is for routing alone and follows
    from a 2-D `attention_mask` by default. `seq_idx` [B, S] numbers the documents of packed rows; `cu_seqlens`
    [K + 1] gives their borders in a single row.
    """

    attention_mask: Tensor | None
    padding_mask: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None


class BlockArguments(BatchArguments, total=False):
    """The same for one block, or `batch`: all of it, already worked out."""

    batch: Batch | None


class Rotaries(TypedDict):
    """The modules that give the tables of either kind; transformers' module gives both."""

    main: nn.Module
    compress: nn.Module


def make_batch(
    config: DeepseekV4Config,
    rotaries: Rotaries,
    hidden: Tensor,
    *,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Batch:
    """Work out a batch from its arguments (see `BatchArguments`); `hidden` [B, S, ...] gives sizes and dtype.

    `position_ids` [B, S] or [1, S] default to places within the document, and may not differ from them in packed rows.
    In others they should count from 0 too: compressed entries lie at places of the row.

    Raises ValueError for shapes and combinations other than these, and for padding before valid tokens.
    """
    shape = (hidden.shape[0], hidden.shape[1])
    documents = _documents(shape, hidden.device, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    _check_masks(shape, attention_mask, padding_mask, documents)
    positions = _positions(shape, hidden.device, position_ids, documents)
    if attention_mask is not None and attention_mask.dim() == 2 and padding_mask is None:
        padding_mask = attention_mask == 0
    sample = hidden[:1, :1, ..., :1]  # the rotary modules read dtype and device of what they are given
    embeddings: dict[str, tuple[Tensor, Tensor]] = {
        "main": rotaries["main"](sample, position_ids=positions, layer_type="main"),
        "compress": rotaries["compress"](sample, position_ids=positions, layer_type="compress"),
    }
    if documents is None:
        mask = _scores_mask(attention_mask, shape, window=config.sliding_window, like=hidden)
    else:  # padding is behind its document's tokens or a document of its own: causality hides it
        rows = (documents.count, positions.shape[1])
        mask = _scores_mask(None, rows, window=config.sliding_window, like=hidden)
    return Batch(positions, embeddings, mask, documents, padding_mask, input_ids)


def resolve_batch(
    config: DeepseekV4Config, rotaries: Rotaries, hidden: Tensor, position_ids: Tensor | None, given: BlockArguments
) -> Batch:
    """The batch that a caller worked out before, or one worked out from its arguments.

    Raises ValueError if both are given, and TypeError for an unknown argument.
    """
    arguments: dict[str, Any] = {"position_ids": position_ids, **given}
    batch: Batch | None = arguments.pop("batch", None)
    if batch is None:
        return make_batch(config, rotaries, hidden, **arguments)
    if extra := sorted(name for name, value in arguments.items() if value is not None):
        raise ValueError(f"batch is given together with {', '.join(extra)}, which it already holds")
    return batch


def shift_ids(ids: Tensor, documents: Documents | None) -> Tensor:
    """Token ids [B, S] one place to the left; the freed place, at the end of every document, holds token 0."""
    shifted = roll_tensor(ids)
    return shifted if documents is None else shifted.masked_fill(documents.last, 0)


def _documents(shape: tuple[int, int], device: torch.device, **given: Tensor | None) -> Documents | None:
    if given["seq_idx"] is not None and given["cu_seqlens"] is not None:
        raise ValueError("both seq_idx and cu_seqlens are given, expected at most one")
    numbers = packed_seq_idx(given, *shape, device=device)
    return None if numbers is None else Documents.from_seq_idx(numbers)


def _positions(
    shape: tuple[int, int], device: torch.device, given: Tensor | None, documents: Documents | None
) -> Tensor:
    if given is not None and given.shape not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids has shape {tuple(given.shape)}, expected {shape} or {(1, shape[1])}")
    if documents is None:
        return torch.arange(shape[1], device=device).unsqueeze(0) if given is None else given
    if given is not None and not torch.equal(given.expand(shape), documents.offset):
        raise ValueError("position_ids of packed rows must count from 0 in every document")
    return documents.unpack(documents.offset)


def _check_masks(
    shape: tuple[int, int], attention_mask: Tensor | None, padding_mask: Tensor | None, documents: Documents | None
) -> None:
    if padding_mask is not None and padding_mask.shape != shape:
        raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}, expected {shape}")
    if attention_mask is None:
        return
    rows, length = shape
    if attention_mask.shape not in (shape, (rows, 1, length, length), (1, 1, length, length)):
        expected = f"{shape} or {(rows, 1, length, length)}"
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {expected}")
    if attention_mask.dim() == 4:
        if documents is not None:
            raise ValueError("a 4-D attention_mask cannot be combined with seq_idx or cu_seqlens")
        return
    valid = attention_mask != 0
    resumes = valid[:, 1:] & ~valid[:, :-1]  # a valid token right after padding
    if documents is not None:
        resumes = resumes & ~documents.last[:, :-1]
    if resumes.any():
        # Compressed entries pool fixed windows: padding before a token would be pooled with it, unseen.
        raise ValueError(
            f"attention_mask has padding before valid tokens in {int(resumes.any(1).sum())} row(s); "
            "pad on the right, or give seq_idx with the padding as a document of its own"
        )


def _scores_mask(mask: Tensor | None, shape: tuple[int, int], *, window: int, like: Tensor) -> Tensor:
    """What is added to attention scores: 0 where a query sees a raw key, the lowest number where it does not."""
    rows, length = shape
    if mask is not None and mask.dim() == 4 and mask.is_floating_point():
        return mask.to(like.dtype).expand(rows, -1, -1, -1)
    if mask is not None and mask.dim() == 4:
        visible = mask.bool()
    else:
        place = torch.arange(length, device=like.device)
        distance = place.unsqueeze(1) - place  # query - key
        visible = ((distance >= 0) & (distance < window))[None, None]  # [1, 1, S, S]
        if mask is not None:
            visible = visible & (mask != 0)[:, None, None, :]
    lowest = torch.finfo(like.dtype).min
    added = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(~visible, lowest)
    return added.expand(rows, -1, -1, -1)
