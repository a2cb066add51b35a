"""Megatron-Core's HybridModel: layers of one block each, in the order of a pattern."""

from __future__ import annotations

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.layer_specs import get_hybrid_mtp_block_spec, get_hybrid_stack_spec
from mtp_convert.models.megatron.mtp_block import MultiTokenPredictionBlockSubmodules
from mtp_convert.models.megatron.transformer_block import HybridStack


class HybridModel(LanguageModel):
    """See LanguageModel. ValueError for settings without a layer pattern."""

    decoder: HybridStack

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        if config.hybrid is None:
            raise ValueError("a hybrid model needs hybrid_layer_pattern")
        super().__init__(config, pg_collection=pg_collection, vp_stage=vp_stage)

    def _build_decoder(self) -> HybridStack:
        spec, offset = get_hybrid_stack_spec(self.config, self.vp_stage, self.pg_collection.pp.rank())
        return HybridStack(
            self.config,
            spec,
            layer_offset=offset,
            norm_name="final_norm" if self.post_process else None,
            pre_process=self.pre_process,
            pg_collection=self.pg_collection,
        )

    def _mtp_spec(self) -> MultiTokenPredictionBlockSubmodules | None:
        return get_hybrid_mtp_block_spec(self.config, self.vp_stage)
