"""The states of a hybrid model between calls: keys and values of attention, Mamba's two states, nothing for others.

Symbols: B rows, S cached positions, C convolved channels, W convolution width, N Mamba heads, P their size, R state
size.

Both kinds can go back by some tokens, which speculative decoding needs. Keys are simply cut. Mamba has one state for
all that went before, so while recording it keeps the states after each token of the last call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig
from transformers.cache_utils import Cache, DynamicLayer

from mtp_convert.models.nemotron_v3.config import BlockType, block_types


class KeyValueLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """`keys` and `values` [B, heads, S, head size]: views of buffers that double when full: no copy per token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, head size]; returns all keys and values."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            self._buffers = []  # autograd cannot follow writes into memory that an earlier step reads
            appended: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return appended
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._buffers = [
                _grown(old, like, 2 * end) for old, like in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :].copy_(new)
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` tokens; nothing happens before the first one."""
        if self.is_initialized and tokens_to_remove and self.keys is not None and self.values is not None:
            self.keys, self.values = (t[..., :tokens_to_remove, :] for t in (self.keys, self.values))

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = []
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._buffers = []
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._buffers = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._buffers = []
        super().batch_select_indices(indices)


def _grown(old: Tensor | None, like: Tensor, length: int) -> Tensor:
    """Room for `length` positions of tensors like `like`, the first of which hold `old`, if there is any."""
    buffer = like.new_empty((*like.shape[:-2], length, like.shape[-1]))
    if old is not None and old.numel():
        buffer[..., : old.shape[-2], :] = old
    return buffer


@dataclass(frozen=True)
class MambaState:
    """Mamba after some token: the last W inputs of the convolution [B, C, W] and the recurrent state [B, N, P, R]."""

    conv: Tensor
    ssm: Tensor

    def rows(self, indices: Tensor) -> "MambaState":
        """The states of these rows."""
        return MambaState(self.conv.index_select(0, indices), self.ssm.index_select(0, indices))


class MambaLayer:
    """`state` after the last token, None before the first; while recording also the states of the last call."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.state: MambaState | None = None
        self.record_past = False
        self._past: list[MambaState] = []  # before the last call, then after each of its tokens

    def store(self, states: Sequence[MambaState]) -> None:
        """Go on with the last of `states`: before the call and after each token, or just one state."""
        self.state = states[-1]
        self._past = list(states) if self.record_past else []

    def activate_past_recording(self) -> None:
        """From now on, calls can be undone in part by `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` tokens of the last call, once; nothing happens before the first call.

        Raises ValueError if the states of that time were not kept.
        """
        if self.state is None:
            return
        if tokens_to_remove > 0 or -tokens_to_remove > max(len(self._past) - 1, 0):
            kept = max(len(self._past) - 1, 0)
            raise ValueError(f"crop({tokens_to_remove}): expected -{kept} to 0, the recorded part of the last call")
        if tokens_to_remove:
            self.state = self._past[tokens_to_remove - 1]
        self._past = []

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._past = None, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.state is not None:
            indices = indices.to(self.state.conv.device)
            self.state = self.state.rows(indices)
            self._past = [state.rows(indices) for state in self._past]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(len(self.state.conv), device=self.state.conv.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1


class StatelessLayer:
    """The place of a block that sees single positions: nothing to keep."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def reset(self) -> None:
        """Nothing to forget."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to undo."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """No rows."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """No rows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """No rows."""

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1


_LAYERS: dict[BlockType, type[Any]] = {
    "mamba": MambaLayer,
    "attention": KeyValueLayer,
    "mlp": StatelessLayer,
    "moe": StatelessLayer,
}


class NemotronHybridCache(Cache):
    """One layer per block of `config`, and behind them one per MTP sub-layer if `mtp_block_types` names them.

    `length` is the number of cached tokens; the model that fills the cache counts it with `advance`.
    """

    def __init__(self, config: NemotronHConfig, *, mtp_block_types: Sequence[BlockType] = ()) -> None:
        super().__init__(layers=[_LAYERS[kind]() for kind in (*block_types(config), *mtp_block_types)])
        self.length = 0

    @property
    def has_previous_state(self) -> bool:  # type: ignore[override]
        """Whether anything is cached."""
        return self.length > 0

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has seen."""
        self.length += tokens

    def mamba(self, layer_idx: int) -> MambaLayer:
        """The cache of a Mamba block."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, MambaLayer), f"block {layer_idx} is no Mamba block"
        return layer

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` tokens.

        Raises ValueError for more than are cached, or in Mamba blocks for more than were recorded.
        """
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"crop({tokens_to_remove}): expected {-self.length} to 0, as many tokens as are cached")
        super().crop(tokens_to_remove)
        self.length += tokens_to_remove

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.length = 0

    def activate_past_recording(self) -> None:
        """From now on, `crop` can undo the last call also in Mamba blocks, which keep its states."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens; the same for every layer."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens see, and the position of the first."""
        return self.length + query_length, 0
