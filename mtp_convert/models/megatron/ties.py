"""Weights of which the stage with the MTP layers holds a copy.

The embedding belongs to the first pipeline stage and the output layer to the last; a stage that runs MTP layers needs
both. Its copy is stored under the owner's key, as a replica that is never written.
"""

from __future__ import annotations

from torch import Tensor

from mtp_convert.models.megatron.groups import Group
from mtp_convert.models.megatron.sharding import (
    ShardedStateDict,
    groups_or_current,
    make_tp_sharded_tensor_for_checkpoint,
)


def tie_word_embeddings_state_dict(
    sharded_state_dict: ShardedStateDict,
    word_emb_weight: Tensor,
    word_emb_weight_key: str,
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> None:
    """Make the entry of the word embedding [V / tp, H] the second copy of the first stage's, in place.

    KeyError if the entry is missing.
    """
    _tie(sharded_state_dict, word_emb_weight, word_emb_weight_key, tp_group, dp_cp_group)


def tie_output_layer_state_dict(
    sharded_state_dict: ShardedStateDict,
    output_layer_weight: Tensor,
    output_layer_weight_key: str,
    tp_group: Group | None = None,
    dp_cp_group: Group | None = None,
) -> None:
    """Make the entry of the output layer [V / tp, H] the second copy of the last stage's, in place.

    KeyError if the entry is missing.
    """
    _tie(sharded_state_dict, output_layer_weight, output_layer_weight_key, tp_group, dp_cp_group)


def _tie(
    entries: ShardedStateDict, weight: Tensor, key: str, tp_group: Group | None, dp_cp_group: Group | None
) -> None:
    """Pipeline copy 1 of a vocabulary-parallel weight, whose padding may differ from the stored one."""
    if key not in entries:
        raise KeyError(f"{key} is not in the sharded state dict, so nothing can be tied to it")
    tp, dp_cp = groups_or_current(tp_group, dp_cp_group)
    entries[key] = make_tp_sharded_tensor_for_checkpoint(
        weight,
        key,
        replica_id=(1, 0, dp_cp.rank()),
        allow_shape_mismatch=True,
        tp_group=tp,
        dp_cp_group=dp_cp,
    )
