"""Weights for the real Megatron-Core's model: what its own `sharded_state_dict` asks for, from this package's reader.

`dist_checkpointing.load` would unpickle a file of the checkpoint; here nothing that a checkpoint says is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.containers.base import Stored
from mtp_convert.verify.residency import Slot, slots
from mtp_convert.verify.stored_weights import CheckpointValues

_WRAPPERS = ("", "model.", "module.", "module.module.")
_EMBEDDING = "embedding.word_embeddings.weight"
# One norm under two names: beside the linear behind it, and inside of that where TransformerEngine computes both.
_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".q_layernorm.", ".linear_q_up_proj.layer_norm_"),
    (".kv_layernorm.", ".linear_kv_up_proj.layer_norm_"),
)


class Part(NamedTuple):
    """A block of a stored tensor. padded: the stored one may have more rows or fewer, which are zero."""

    key: str
    shape: tuple[int, ...]  # of the whole
    place: tuple[int | slice, ...]
    padded: bool


class Entry(NamedTuple):
    """A tensor of the model: lists or dicts of parts, and what makes it of their values."""

    parts: Any
    merge: Callable[[Any], Tensor]


class CoreWeights:
    """Tensors of Megatron-Core's model as parts of stored ones.

    ValueError that names every tensor that is missing, left over or of another shape.
    """

    def __init__(self, model: nn.Module, stored: Stored, unmapped: Collection[str]) -> None:
        values = CheckpointValues(stored)
        self._wrapper = next((w for w in _WRAPPERS if w + _EMBEDDING in values), "")
        self._tensors = {
            name.removeprefix(self._wrapper): tensor
            for name, tensor in values.items()
            if name not in unmapped and not name.endswith("_extra_state")
        }
        own = slots(model)
        self._entries = _entries(model, own, self._tensors)
        if stored.container == "legacy":  # ranks store what modules hold, under the modules' own names
            self._entries = {name: _as_held(name, own[name], entry) for name, entry in self._entries.items()}
        problems = [f"no part of a checkpoint by Megatron-Core: {name}" for name in own.keys() - self._entries.keys()]
        if problems := [*problems, *self._problems()]:
            raise ValueError("the checkpoint does not fit Megatron-Core's model:\n  " + "\n  ".join(problems))

    def sources(self, name: str) -> tuple[str, ...]:
        """See Weights."""
        return tuple(self._wrapper + self._stored_key(part.key) for part in _leaves(self._entries[name].parts))

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Weights."""
        return {name: self._tensor(self._entries[name]).to(like.dtype).contiguous() for name, like in wanted.items()}

    def _tensor(self, entry: Entry) -> Tensor:
        return entry.merge(_mapped(self._values, entry.parts))

    def _values(self, part: Part) -> Tensor:
        whole = self._tensors[self._stored_key(part.key)]
        if part.padded:
            values = whole[: part.shape[0]]
            return F.pad(values, (*(0, 0) * (values.dim() - 1), 0, part.shape[0] - len(values)))[part.place]
        return whole[part.place]

    def _stored_key(self, key: str) -> str:
        """The key itself, or the key that the same tensor has under other layers, where only that is stored."""
        if key in self._tensors:
            return key
        others = [key.replace(a, b) for pair in _NORMS for a, b in (pair, pair[::-1]) if a in key]
        experts, found, inner = key.partition(".local_experts.")
        if found:
            number, _, linear = inner.partition(".")
            others.append(f"{experts}.{linear}{number}")
        return next((other for other in others if other in self._tensors), key)

    def _problems(self) -> Iterator[str]:
        parts = {self._stored_key(p.key): p for entry in self._entries.values() for p in _leaves(entry.parts)}
        yield from (f"missing {key}" for key in sorted(parts.keys() - self._tensors.keys()))
        for key, part in parts.items():
            free = int(part.padded)
            if key in self._tensors and tuple(self._tensors[key].shape)[free:] != part.shape[free:]:
                yield f"{key}: shape {list(self._tensors[key].shape)}, expected {list(part.shape)}"
        left = sorted(self._tensors.keys() - parts.keys())
        yield from (f"unexpected {key}" for key in left if "/shard_" not in key)


def _entries(model: Any, own: Collection[str], names: Collection[str]) -> dict[str, Entry]:  # noqa: ANN401
    """What the model says that its `own` tensors are in a torch_dist checkpoint with `names` of this spelling."""
    from megatron.core import parallel_state

    metadata = {
        "non_homogeneous_layers": any(name.startswith("decoder.layers.0.") for name in names),
        "singleton_local_shards": any(".experts.experts.0." in name for name in names),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {name: _entry(given) for name, given in model.sharded_state_dict(metadata=metadata).items() if name in own}


def _entry(given: Any) -> Entry:  # noqa: ANN401 - a ShardedTensor or a ShardedTensorFactory
    if hasattr(given, "build"):
        return Entry(_mapped(_part, given.build()), given.merge_fn)
    return Entry([_part(given)], _only)


def _part(given: Any) -> Part:  # noqa: ANN401 - a ShardedTensor
    outer, inner = given.global_offset[: given.prepend_axis_num], given.global_offset[given.prepend_axis_num :]
    index = (*outer, *(slice(o, o + n) for o, n in zip(inner, given.local_shape, strict=True)))
    return Part(given.key, tuple(given.global_shape), index, given.allow_shape_mismatch)


def _as_held(name: str, slot: Slot, entry: Entry) -> Entry:
    """The entry of a tensor that is stored as the module holds it."""
    shape = tuple(slot.tensor.shape)
    padded = any(part.padded for part in _leaves(entry.parts))
    return Entry([Part(name, shape, tuple(slice(n) for n in shape), padded)], _only)


def _only(values: list[Tensor]) -> Tensor:
    return values[0]


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:  # noqa: ANN401 - nested lists and dicts
    if isinstance(tree, dict):
        return {name: _mapped(change, branch) for name, branch in tree.items()}
    return [_mapped(change, branch) for branch in tree] if isinstance(tree, list) else change(tree)


def _leaves(tree: Any) -> Iterator[Part]:  # noqa: ANN401 - nested lists and dicts
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree
