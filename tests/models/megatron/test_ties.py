"""Copies of the embedding and the output layer, against megatron-core 0.19.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharding import described
from torch import Tensor

from mtp_convert.models.megatron.groups import Member, ParallelSizes, use_groups
from mtp_convert.models.megatron.sharding import (
    ShardedStateDict,
    is_main_replica,
    make_tp_sharded_tensor_for_checkpoint,
)
from mtp_convert.models.megatron.ties import tie_output_layer_state_dict, tie_word_embeddings_state_dict

ENTRIES = json.loads((Path(__file__).parent / "data" / "entries.json").read_text())["cases"]
CASES = [case for case in ENTRIES if "tied_embedding" in case]
FUNCTIONS = {
    "tied_embedding": ("e.w", tie_word_embeddings_state_dict),
    "tied_output": ("o.w", tie_output_layer_state_dict),
}


def weight() -> Tensor:
    return torch.arange(6.0).view(3, 2)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"tp{c['tp']}-dp{c['dp_cp']}")
def test_the_copy_is_the_one_megatron_core_makes(case: dict[str, Any], kind: str) -> None:
    key, tie = FUNCTIONS[kind]
    tp, dp_cp = Member(*case["tp"]), Member(*case["dp_cp"])
    other = torch.zeros(5, 2)  # the tie replaces whatever was there
    entries: ShardedStateDict = {key: make_tp_sharded_tensor_for_checkpoint(other, key, tp_group=tp, dp_cp_group=dp_cp)}
    tie(entries, weight(), key, tp, dp_cp)
    assert {name: described(entry) for name, entry in entries.items()} == case[kind]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_groups_default_to_the_current_ones(kind: str) -> None:
    key, tie = FUNCTIONS[kind]
    with use_groups(ParallelSizes(tp=2, dp=3).at(5)):
        entries: ShardedStateDict = {key: make_tp_sharded_tensor_for_checkpoint(weight(), key)}
        assert entries[key].replica_id == (0, 0, 2)
        tie(entries, weight(), key)
    assert entries[key].replica_id == (1, 0, 2)
    assert entries[key].global_offset == (3, 0)
    assert entries[key].allow_shape_mismatch
    assert not is_main_replica(entries[key].replica_id)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_missing_weight_cannot_be_tied(kind: str) -> None:
    key, tie = FUNCTIONS[kind]
    with pytest.raises(KeyError, match=f"{key} is not in the sharded state dict"):
        tie({}, weight(), key)
