"""Multi-Token Prediction under the names of Megatron-Core's module of the same name."""

from mtp_convert.models.megatron.loss import MTPLossAutoScaler
from mtp_convert.models.megatron.loss_logging import MTPLossLoggingHelper
from mtp_convert.models.megatron.mtp_block import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    _get_mtp_block_submodules,
    get_mtp_layer_spec,
    get_mtp_layer_spec_for_backend,
)
from mtp_convert.models.megatron.mtp_layer import MultiTokenPredictionLayer, MultiTokenPredictionLayerSubmodules
from mtp_convert.models.megatron.placement import get_mtp_layer_offset, get_mtp_num_layers_to_build
from mtp_convert.models.megatron.roll import _roll_tensor_packed_seq, roll_tensor
from mtp_convert.models.megatron.ties import tie_output_layer_state_dict, tie_word_embeddings_state_dict

__all__ = [
    "SUPPORTED_ATTN_MASK",
    "MTPLossAutoScaler",
    "MTPLossLoggingHelper",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionBlockSubmodules",
    "MultiTokenPredictionLayer",
    "MultiTokenPredictionLayerSubmodules",
    "_get_mtp_block_submodules",
    "_roll_tensor_packed_seq",
    "get_mtp_layer_offset",
    "get_mtp_layer_spec",
    "get_mtp_layer_spec_for_backend",
    "get_mtp_num_layers_to_build",
    "roll_tensor",
    "tie_output_layer_state_dict",
    "tie_word_embeddings_state_dict",
]

SUPPORTED_ATTN_MASK = ("causal", "padding_causal", "no_mask", "padding")  # kinds of attention masks
