"""Checkpoints into models and out of them: whole tensors under global keys to a stage's state dict, and back.

Which slice of which tensor a module holds is what its `sharded_state_dict` says; no name is translated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.sharding import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
    iter_shards,
)

_SHARD = "/shard_"


class Whole(Protocol):
    """A whole tensor, in memory or not, of which parts can be taken."""

    @property
    def shape(self) -> torch.Size:
        """Its sizes."""

    def __getitem__(self, index: Any, /) -> Tensor:  # noqa: ANN401 - as torch
        """The part that numbers and slices choose."""


def load_tensors(model: MegatronModule, tensors: Mapping[str, Whole], metadata: Metadata | None = None) -> None:
    """Fill `model` from `tensors`, the whole tensors of a torch_dist checkpoint by key. See `state_from_tensors`."""
    model.load_state_dict(state_from_tensors(model, tensors, metadata), strict=True)


def state_from_tensors(
    model: MegatronModule, tensors: Mapping[str, Whole], metadata: Metadata | None = None
) -> dict[str, Any]:
    """The state dict that `model` has in a checkpoint.

    Every entry must find its tensor, in its shape; a stage takes its part and leaves the rest, a whole model must leave
    nothing. Padded vocabularies may differ: surplus rows are cut, missing ones are zero. Objects (`_extra_state`) hold
    no numbers and are the model's own. ValueError names everything that is missing, left over or of another shape.
    """
    entries = model.sharded_state_dict(metadata=metadata)
    check_tensors(model, entries, tensors)
    own = {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
    return own | {n: local_tensor(e, tensors) for n, e in entries.items() if not isinstance(e, ShardedObject)}


def check_tensors(model: MegatronModule, entries: ShardedStateDict, tensors: Mapping[str, Whole]) -> None:
    """ValueError that names every tensor of `entries` that is missing or of another shape, and what is left over."""
    shards = [shard for shard in iter_shards(entries) if isinstance(shard, ShardedTensor)]
    problems = [f"missing {key}" for key in sorted({s.key for s in shards} - tensors.keys())]
    problems += [
        f"{s.key}: shape {list(tensors[s.key].shape)}, expected {list(s.global_shape)}"
        for s in shards
        if s.key in tensors and not _fits(tensors[s.key], s)
    ]
    if model.pg_collection.pp.size() == 1:
        stored = {key for key in tensors if _SHARD not in key}
        problems += [f"unexpected {key}" for key in sorted(stored - {s.key for s in shards})]
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(dict.fromkeys(problems)))


def local_tensor(entry: ShardedTensor | ShardedTensorFactory, tensors: Mapping[str, Whole]) -> Tensor:
    """What one entry holds of the whole tensors."""
    if isinstance(entry, ShardedTensorFactory):
        return entry.merge_fn([_slice(shard, tensors[shard.key]) for shard in entry.build()])
    return _slice(entry, tensors[entry.key])


def mtp_experts(keys: Iterable[str]) -> bool | None:
    """Whether the MTP layers that are stored under `keys` have experts; None without any.

    Megatron makes them like the decoder's last layer unless it is given a layer spec, of which no argument tells.
    """
    stored = [key for key in keys if "mtp.layers." in key]
    return any(".mlp.router." in key for key in stored) if stored else None


def load_rank(model: MegatronModule, state: Mapping[str, Any]) -> None:
    """Fill `model`, the stage and rank that it is, from the state dict that one process stored (`mp_rank` files).

    Which modules own an `_extra_state` depends on TransformerEngine's version, so these may be there or not. ValueError
    names everything that is missing or left over.
    """
    own = model.state_dict()
    stored, wanted = ({n for n in names if not n.endswith("_extra_state")} for names in (state, own))
    problems = [f"missing {name}" for name in sorted(wanted - stored)]
    problems += [f"unexpected {name}" for name in sorted(stored - wanted)]
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict({**own, **{name: state[name] for name in stored}}, strict=True)


def tensors_from_ranks(ranks: Iterable[ShardedStateDict]) -> dict[str, Tensor]:
    """The whole tensors, by key, of which `ranks` hold the parts: the sharded state dicts of every rank of a job.

    ValueError, naming all of them, for tensors of which parts are missing.
    """
    whole: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for entries in ranks:
        for shard in iter_shards(entries):
            if not isinstance(shard, ShardedTensor) or not is_main_replica(shard.replica_id):
                continue
            assert shard.data is not None
            if shard.key not in whole:
                whole[shard.key] = torch.empty(shard.global_shape, dtype=shard.dtype)
                missing[shard.key] = whole[shard.key].numel()
            whole[shard.key][shard.global_slice()] = shard.data.detach()
            missing[shard.key] -= shard.data.numel()
    if torn := sorted(key for key, count in missing.items() if count):
        raise ValueError(f"ranks do not hold all of {', '.join(torn)}")
    return whole


def _fits(tensor: Whole, shard: ShardedTensor) -> bool:
    first = 1 if shard.allow_shape_mismatch else 0
    return tuple(tensor.shape[first:]) == shard.global_shape[first:]


def _slice(shard: ShardedTensor, tensor: Whole) -> Tensor:
    if shard.allow_shape_mismatch:
        rows = shard.global_shape[0]
        tensor = F.pad(tensor[:rows], (0, 0, 0, max(rows - tensor.shape[0], 0)))
    return tensor[shard.global_slice()]
