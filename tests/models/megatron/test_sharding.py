"""Sharded state dict entries against megatron-core 0.19.2's, and against what sharding means."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_convert.models.megatron.factories import (
    apply_mamba_sharded_factories,
    apply_swiglu_sharded_factory,
    split_tensor_factory,
)
from mtp_convert.models.megatron.groups import Member, ParallelSizes, use_groups
from mtp_convert.models.megatron.sharding import (
    ShardedEntry,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    apply_prefix_mapping,
    is_main_replica,
    iter_shards,
    make_sharded_object_for_checkpoint,
    make_sharded_tensor_for_checkpoint,
    make_sharded_tensors_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
    replace_prefix_for_sharding,
    sharded_state_dict_default,
)

ENTRIES = json.loads((Path(__file__).parent / "data" / "entries.json").read_text())["cases"]
PLACE = (
    "key",
    "local_shape",
    "global_shape",
    "global_offset",
    "axis_fragmentations",
    "replica_id",
    "prepend_axis_num",
    "allow_shape_mismatch",
)


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(*shape)


def listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


Described = dict[str, object] | list["Described"]


def described(entry: ShardedEntry) -> Described:
    """An entry in the words of the reference data."""
    if isinstance(entry, ShardedTensorFactory):
        return [described(part) for part in entry.build()]
    if isinstance(entry, ShardedObject):
        return {"unique_key": entry.unique_key, "replica_id": listed(entry.replica_id)}
    assert entry.data is not None
    return {name: listed(getattr(entry, name)) for name in PLACE} | {"data": entry.data.flatten().tolist()}


def assembled(shards: Iterable[ShardedTensor | ShardedObject]) -> dict[str, Tensor]:
    """The global tensors that main replicas make up; every element is written once."""
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            whole = tensors.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))
            assert whole[shard.global_slice()].isnan().all(), shard
            whole[shard.global_slice()] = shard.data
    assert not any(t.isnan().any() for t in tensors.values())
    return tensors


@pytest.mark.parametrize("case", ENTRIES, ids=lambda c: f"tp{c['tp']}-dp{c['dp_cp']}-{len(c['offsets'])}")
def test_entries_are_those_of_megatron_core(case: dict[str, Any]) -> None:
    offsets = tuple(tuple(o) for o in case["offsets"])
    groups = {"tp_group": Member(*case["tp"]), "dp_cp_group": Member(*case["dp_cp"])}
    state = {"weight": numbered(4, 3), "bias": numbered(4), "norm": numbered(3), "row": numbered(2, 6)}
    axes = {"weight": 0, "bias": 0, "row": 1}
    entries = make_sharded_tensors_for_checkpoint(
        state | {"_extra_state": None},
        "m.",
        axes,
        offsets,
        tp_group=groups["tp_group"],
        dp_cp_group=Member(*case["dp_cp"]),
    )
    assert {key: described(entry) for key, entry in entries.items()} == case["tensors"]
    fc1 = make_tp_sharded_tensor_for_checkpoint(numbered(4, 2), "m.fc1", prepend_offsets=offsets, **groups)
    assert described(apply_swiglu_sharded_factory(fc1, offsets)) == case["swiglu"]
    assert described(apply_swiglu_sharded_factory(fc1, offsets, True)) == case["swiglu_singleton"]
    in_proj = make_tp_sharded_tensor_for_checkpoint(numbered(9, 2), "m.in_proj", prepend_offsets=offsets, **groups)
    split = split_tensor_factory(in_proj, (2, 2, 2, 2, 1), ("z", "x", "B", "C", "dt"))
    assert described(split) == case["split"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("layers", [None, 3])
def test_ranks_make_up_the_whole_gated_weight(tp: int, layers: int | None) -> None:
    gate, up = numbered(8, 2), numbered(8, 2) + 100
    shards = []
    for layer in range(layers or 1):
        offsets = () if layers is None else ((0, layer, layers),)
        for rank in range(tp):
            local = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]) + 1000 * layer
            with use_groups(ParallelSizes(tp=tp).at(rank)):
                whole = make_tp_sharded_tensor_for_checkpoint(local, "fc1", prepend_offsets=offsets)
            shards += apply_swiglu_sharded_factory(whole, offsets).build()
    expected = torch.cat([gate, up])
    stacked = torch.stack([expected + 1000 * layer for layer in range(layers or 1)])
    assert torch.equal(assembled(shards)["fc1"], expected if layers is None else stacked)


def mixer(tp: int, rank: int) -> ShardedStateDict:
    """Entries of one rank of a Mamba mixer: 8 inner channels, 4 of B and C, 2 heads, hidden size 3."""
    parts = {"z": 8, "x": 8, "B": 4, "C": 4, "dt": 2}
    rows = {n: numbered(size, 3) + 100 * i for i, (n, size) in enumerate(parts.items())}
    state = {
        "in_proj.weight": torch.cat([rows[n].chunk(tp)[rank] for n in parts]),
        "conv1d_weight": torch.cat([rows[n].chunk(tp)[rank] for n in "xBC"]),
        "conv1d_bias": torch.cat([rows[n][:, 0].chunk(tp)[rank] for n in "xBC"]),
    }
    groups = ParallelSizes(tp=tp).at(rank)
    entries = make_sharded_tensors_for_checkpoint(state, "m.", dict.fromkeys(state, 0), tp_group=groups.tp)
    apply_mamba_sharded_factories(entries, "m.", d_inner=8 // tp, d_bc=4 // tp, nheads=2 // tp)
    return entries


def test_a_mamba_mixer_is_stored_alike_at_any_tensor_size() -> None:
    one, two = (assembled(iter_shards([mixer(tp, rank) for rank in range(tp)])) for tp in (1, 2))
    assert sorted(one) == [
        *(f"m.conv1d.{leaf}.{part}" for leaf in ("bias", "weight") for part in "BCx"),
        *(f"m.in_proj.weight.{part}" for part in ("B", "C", "dt", "x", "z")),
    ]
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(one["m.in_proj.weight.dt"], numbered(2, 3) + 400)


def test_factories_are_built_and_merged_in_place() -> None:
    entries: ShardedStateDict = {"deep": [mixer(2, 1)], "other": 5}
    original = {name: entry.data for name, entry in entries["deep"][0].items()}
    factories: ShardedStateDict = {"deep": [dict(entries["deep"][0])]}
    apply_factories(entries)
    loaded = {"deep": [{n: [e.data for e in built] for n, built in entries["deep"][0].items()}], "other": 5}
    merged = apply_factory_merges(loaded, factories)
    assert merged is loaded
    assert merged["other"] == 5
    assert all(torch.equal(merged["deep"][0][name], data) for name, data in original.items())


def test_a_merge_without_its_parts_is_refused() -> None:
    with pytest.raises(KeyError, match=r"m\.in_proj"):
        apply_factory_merges({}, mixer(1, 0))


def test_keys_are_renamed_and_names_are_not() -> None:
    entries = mixer(1, 0) | {"m._extra_state": make_sharded_object_for_checkpoint(None, "m._extra_state")}
    names = list(entries)
    apply_prefix_mapping(entries, {"m.conv1d.": "first.", "m.conv": "second.", "first.": "third.", "m._": "n._"})
    keys = [entry.key for entry in entries.values()]
    assert keys == ["m.in_proj.weight", "first.weight", "first.bias", "n._extra_state"]
    assert list(entries) == names
    with pytest.raises(ValueError, match=r"'m\.': first\.weight, first\.bias, n\._extra_state"):
        replace_prefix_for_sharding(entries, "m.", "x.")
    assert [entry.key for entry in entries.values()] == keys
    replace_prefix_for_sharding(entries, "", "top.")
    assert [entry.key for entry in entries.values()] == [f"top.{key}" for key in keys]


def test_replicas_of_a_whole_tensor() -> None:
    ranks = [ParallelSizes(tp=2, cp=2, dp=2).at(rank) for rank in range(8)]
    entries = []
    for groups in ranks:
        with use_groups(groups):
            entries.append(make_sharded_tensor_for_checkpoint(numbered(2), "norm"))
    assert [e.replica_id for e in entries] == [(0, tp, dp_cp) for dp_cp in range(4) for tp in range(2)]
    assert [is_main_replica(e.replica_id) for e in entries] == [True] + [False] * 7
    assert is_main_replica(0)
    assert not is_main_replica(2)


def test_a_group_passed_alone_leaves_the_other_a_group_of_one() -> None:
    with use_groups(ParallelSizes(tp=2, dp=2).at(3)):
        entry = make_sharded_tensor_for_checkpoint(numbered(2), "norm", tp_group=Member(1, 2))
    assert entry.replica_id == (0, 1, 0)


class WithOwn(nn.Linear):
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"own": (prefix, sharded_offsets, metadata)}


def test_a_module_may_shard_itself() -> None:
    group = Member(1, 2)
    called = sharded_state_dict_default(WithOwn(2, 3), "p.", ((0, 1, 2),), {"dp_cp_group": group, "x": 1})
    assert called == {"own": ("p.", ((0, 1, 2),), {"dp_cp_group": group, "x": 1})}


def test_other_modules_are_whole_on_every_rank_and_keep_their_parameters() -> None:
    module = nn.Linear(2, 3)
    with use_groups(ParallelSizes(dp=2).at(1)):
        entries = sharded_state_dict_default(module, "p.", ((0, 1, 4),))
    assert entries["p.weight"].data is module.weight
    assert entries["p.weight"].global_shape == (4, 3, 2)
    assert entries["p.bias"].replica_id == (0, 0, 1)


def test_object_names() -> None:
    plain_object = make_sharded_object_for_checkpoint(None, "a/b._extra_state")
    expert = make_sharded_object_for_checkpoint(None, "e._extra_state", ((1, 2, 4), (0, 1, 3)))
    assert plain_object.unique_key == "a/b._extra_state/shard_0_1"
    assert expert.unique_key == "e._extra_state/shard_1.2_3.4"
    for entry in (plain_object, expert):
        assert ShardedObject.empty_from_unique_key(entry.unique_key, entry.replica_id) == entry
    with pytest.raises(ValueError, match=r"axes 0 to 0 expected, got \[\(1, 0, 2\)\]"):
        make_sharded_object_for_checkpoint(None, "e", ((1, 0, 2),))
    for wrong in ("a", "a/shard_0", "a/shard_0_1_2", "a/shard_x_1"):
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            ShardedObject.empty_from_unique_key(wrong)
    with pytest.raises(ValueError, match="does not fit shape"):
        ShardedObject("a/b", None, (1, 2), (0,))


def test_narrowing_keeps_a_tensors_place() -> None:
    whole = ShardedTensor.from_rank_offsets("w", numbered(6, 2), (0, 1, 3), (1, 1, 2), prepend_axis_num=1)
    part = whole.narrow(0, 2, 3)
    assert (part.global_shape, part.global_offset) == ((3, 6, 2), (1, 3, 0))
    assert part.data is not None
    assert part.data.tolist() == numbered(6, 2)[2:5].tolist()
    assert whole.without_data().narrow(0, 2, 3) == part.without_data()
    with pytest.raises(ValueError, match="blocks of 6 do not tile axis 1"):
        replace(whole, global_shape=(3, 13, 2), axis_fragmentations=None).narrow(0, 0, 3)


def test_everything_wrong_with_an_entry_is_said() -> None:
    good = ShardedTensor.from_rank_offsets("w", numbered(2, 3))
    with pytest.raises(ValueError) as refusal:
        replace(good, dtype=torch.int8, global_shape=(2,), global_offset=(1, 0))
    assert str(refusal.value) == (
        "w: data is torch.float32 (2, 3), expected torch.int8 (2, 3); global_shape (2,) has 1 axes, expected 2; "
        "global offset (1, 0) is no multiple of the local shape (2, 3)"
    )
    for offset in ((2, 0, 1), (-1, 0, 1), (0, 2, 2), (0, -1, 2)):
        with pytest.raises(ValueError, match=r"does not fit 2 axes"):
            ShardedTensor.from_rank_offsets("w", numbered(2, 3), offset)


def test_weights_that_do_not_split_are_refused() -> None:
    odd = make_tp_sharded_tensor_for_checkpoint(numbered(3, 2), "w")
    with pytest.raises(ValueError, match="3 rows do not halve"):
        apply_swiglu_sharded_factory(odd, ())
    with pytest.raises(ValueError, match="regular grid"):
        apply_swiglu_sharded_factory(replace(odd.narrow(0, 0, 2), axis_fragmentations=None), ())
    with pytest.raises(ValueError, match="do not cover 3 rows"):
        split_tensor_factory(odd, (1, 1), ("x", "B"))
    with pytest.raises(ValueError, match="do not cover 3 rows"):
        split_tensor_factory(odd, (1, 2), ("x",))
    with pytest.raises(ValueError, match="without data builds nothing"):
        split_tensor_factory(odd, (3,), ("x",)).without_data().build()
