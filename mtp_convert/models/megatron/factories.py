"""Fused weights that Megatron stores in parts: gated linear_fc1 and the projections of a Mamba mixer.

A tensor rank holds its share of every part, one part after another. Cutting the parts apart before they are placed
makes the stored tensor independent of the tensor parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtp_convert.models.megatron.sharding import (
    Offset,
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)


def apply_swiglu_sharded_factory(
    original_sh_ten: ShardedTensor, sharded_offsets: Sequence[Offset], singleton_local_shards: bool = False
) -> ShardedTensorFactory:
    """Store the local [gate; up] of a gated linear_fc1 (rows first) as two blocks of the global [gate; up].

    `sharded_offsets` are those of the prepended axes. `singleton_local_shards` stores two tensors, under the key with
    `_w` (gate) and `_v` (up), instead of two blocks of one. ValueError for an odd number of rows.
    """
    axis = len(sharded_offsets)
    rows = original_sh_ten.local_shape[0]
    if rows % 2:
        raise ValueError(f"{original_sh_ten.key}: {rows} rows do not halve into gate and up")
    if original_sh_ten.axis_fragmentations is None:
        raise ValueError(f"{original_sh_ten.key}: only a regular grid of blocks can be halved")
    blocks = original_sh_ten.axis_fragmentations[axis]
    block = original_sh_ten.global_offset[axis] // rows

    @torch.no_grad()
    def build(key: str, data: Tensor, replica_id: ReplicaId) -> list[ShardedTensor]:
        if singleton_local_shards:
            places = ((f"{key}_w", (axis, block, blocks)), (f"{key}_v", (axis, block, blocks)))
        else:
            places = ((key, (axis, block, 2 * blocks)), (key, (axis, blocks + block, 2 * blocks)))
        return [
            ShardedTensor.from_rank_offsets(
                name, half, *sharded_offsets, offset, replica_id=replica_id, prepend_axis_num=axis
            )
            for (name, offset), half in zip(places, data.chunk(2), strict=True)
        ]

    return ShardedTensorFactory(original_sh_ten.key, original_sh_ten.data, build, _concat, original_sh_ten.replica_id)


def split_tensor_factory(
    original: ShardedTensor, sections: Sequence[int], names: Sequence[str]
) -> ShardedTensorFactory:
    """Store consecutive row ranges of a local tensor as tensors of their own, `KEY.NAME`.

    `sections` are row counts of this rank. ValueError unless they cover the rows and every one has a name.
    """
    rows = original.local_shape[0]
    if sum(sections) != rows or len(sections) != len(names):
        raise ValueError(
            f"{original.key}: sections {dict(zip(names, sections, strict=False))} do not cover {rows} rows"
        )
    place = original.without_data()

    @torch.no_grad()
    def build(key: str, data: Tensor, replica_id: ReplicaId) -> list[ShardedTensor]:
        whole = replace(place, key=key, data=data, dtype=data.dtype, replica_id=replica_id)
        starts = [sum(sections[:i]) for i in range(len(sections))]
        return [
            replace(whole.narrow(0, start, length), key=f"{key}.{name}")
            for start, length, name in zip(starts, sections, names, strict=True)
        ]

    return ShardedTensorFactory(original.key, original.data, build, _concat, original.replica_id)


def apply_mamba_sharded_factories(
    sharded_state_dict: ShardedStateDict, prefix: str, *, d_inner: int, d_bc: int, nheads: int
) -> None:
    """Split a Mamba mixer's `in_proj.weight`, `conv1d_weight` and `conv1d_bias` below `prefix`, in place.

    Sizes are this tensor rank's: `d_inner` inner channels, `d_bc` groups times state size, `nheads` heads. in_proj has
    the rows [z; x; B; C; dt], the convolution [x; B; C]; its entries are stored as `conv1d.weight.*`, `conv1d.bias.*`.
    """
    in_proj = f"{prefix}in_proj.weight"
    in_sections = (d_inner, d_inner, d_bc, d_bc, nheads)
    sharded_state_dict[in_proj] = split_tensor_factory(
        sharded_state_dict[in_proj], in_sections, ("z", "x", "B", "C", "dt")
    )
    for leaf in ("weight", "bias"):
        name = f"{prefix}conv1d_{leaf}"
        conv = replace(sharded_state_dict[name], key=f"{prefix}conv1d.{leaf}")
        sharded_state_dict[name] = split_tensor_factory(conv, (d_inner, d_bc, d_bc), ("x", "B", "C"))


def _concat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)
