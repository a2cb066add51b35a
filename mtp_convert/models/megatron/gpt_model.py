"""Megatron-Core's GPTModel: equal layers, or a few kinds of them, each of attention and a feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from mtp_convert.models.megatron.module import Metadata
from mtp_convert.models.megatron.mtp_block import MultiTokenPredictionBlockSubmodules
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict
from mtp_convert.models.megatron.transformer_block import TransformerBlock, decoder_layers


class GPTModel(LanguageModel):
    """See LanguageModel. ValueError for the settings of a hybrid model."""

    decoder: TransformerBlock

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        if config.hybrid is not None:
            raise ValueError(f"a layer pattern ({config.hybrid}) makes a hybrid model, not a GPT model")
        super().__init__(config, pg_collection=pg_collection, vp_stage=vp_stage)

    def _build_decoder(self) -> TransformerBlock:
        config, rank = self.config, self.pg_collection.pp.rank()
        layers = decoder_layers(config, self.vp_stage, rank)
        # With MTP the norm follows the last layer, since a stage of MTP layers alone may come before the loss.
        last = self.post_process if config.mtp_num_layers is None else config.num_layers - 1 in layers
        return TransformerBlock(
            config,
            get_gpt_decoder_block_spec(config, self.vp_stage, rank),
            layer_offset=layers.start,
            norm_name="final_layernorm" if last else None,
            pre_process=self.pre_process,
            pg_collection=self.pg_collection,
        )

    def _mtp_spec(self) -> MultiTokenPredictionBlockSubmodules | None:
        return get_gpt_mtp_block_spec(self.config, self.vp_stage)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """See LanguageModel; the output layer's empty state is not stored."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        entries.pop(f"{prefix}output_layer._extra_state", None)
        return entries
