"""What every block of one forward pass needs to know beside hidden states.

Symbols: B rows, S new positions, T cached and new positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.documents import Documents, PackedArguments


@dataclass(frozen=True)
class Batch:
    """Masks, documents and cache of one forward pass; `Batch()` is whole rows without padding.

    Attributes:
        attention_mask: for attention, [B, 1, S, T], bool (true: visible) or additive; None: causal.
        padding_mask: for Mamba, [B, S], 0 at padding; None: no padding.
        documents: documents that must not see each other; None: every row is one.
        cache: what went before, and where to keep the rest; None: nothing, nowhere.
    """

    attention_mask: Tensor | None = None
    padding_mask: Tensor | None = None
    documents: Documents | None = None
    cache: NemotronHybridCache | None = None


def make_batch(
    config: NemotronHConfig,
    hidden: Tensor,
    *,
    attention_mask: Tensor | None = None,
    causal_mask_mapping: Mapping[str, Tensor | None] | None = None,
    padding_mask: Tensor | None = None,
    cache: NemotronHybridCache | None = None,
    packed: PackedArguments | None = None,
) -> Batch:
    """Read the arguments of a forward pass over `hidden` [B, S, H].

    Args:
        config: the model's.
        hidden: embeddings or the hidden states of the stage before.
        attention_mask: [B, T], 0 at padding; or [B or 1, 1, S, T], which attention takes as it is, so that it has to
            be causal by itself. Beside documents the former is not read: padding behind a document is not seen.
        causal_mask_mapping: its "full_attention" is such a second mask and goes before.
        padding_mask: bool [B, S], true at padding; read if there is no `attention_mask`.
        cache: see `Batch`.
        packed: see `PackedArguments`.

    Raises ValueError if shapes do not fit, or if packed rows are to be cached; TypeError for another model's cache.
    """
    if cache is not None and not isinstance(cache, NemotronHybridCache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}, expected the NemotronHybridCache of new_cache()")
    rows, length = hidden.shape[:2]
    documents = Documents.from_arguments(packed or {}, rows, length, hidden.device)
    if documents is not None and cache is not None:
        raise ValueError("packed rows cannot be cached: their documents end at different positions")
    if attention_mask is None and padding_mask is not None:
        attention_mask = ~padding_mask.bool()
    total = length + (cache.length if cache is not None else 0)
    _check_mask(attention_mask, rows, length, total)
    visible = (causal_mask_mapping or {}).get("full_attention")
    if visible is None and attention_mask is not None and attention_mask.dim() == 4:
        visible = attention_mask
    given: dict[str, Any] = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        "past_key_values": cache,
    }
    if visible is None and documents is None:
        made: Any = create_causal_mask(**given)  # for "sdpa" a tensor or None
        visible = made
    padding = None if documents is not None else create_recurrent_attention_mask(**given)
    return Batch(visible, padding, documents, cache)


def _check_mask(mask: Tensor | None, rows: int, length: int, total: int) -> None:
    if mask is None:
        return
    shape = tuple(mask.shape)
    flat = shape == (rows, total)
    full = len(shape) == 4 and shape[0] in (1, rows) and shape[2:] == (length, total)
    if not flat and not full:
        raise ValueError(f"attention_mask has shape {shape}, expected {(rows, total)} or [.., .., {length}, {total}]")


def causal_mask(queries: int, keys: int, *, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [rows, 1, queries, keys]: 0 for what the last `queries` of `keys` positions see, else minus infinity."""
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    mask = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(ahead, -torch.inf)
    return mask.expand(rows, 1, -1, -1)
