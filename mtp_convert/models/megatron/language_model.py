"""What GPT and hybrid models share: embedding, decoder, MTP layers and output layer on one pipeline stage.

Symbols: S sequence, B batch, H hidden, V vocabulary, D MTP depths. Token ids and results are batch first, hidden states
sequence first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection, use_groups
from mtp_convert.models.megatron.linear import LanguageModelEmbedding, OutputLayer
from mtp_convert.models.megatron.loss import language_model_loss, process_mtp_loss
from mtp_convert.models.megatron.module import MegatronModule, Metadata
from mtp_convert.models.megatron.mtp_block import MultiTokenPredictionBlock, MultiTokenPredictionBlockSubmodules
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.rope import rotary_angles, token_positions
from mtp_convert.models.megatron.sharding import Offset, ShardedStateDict, make_tp_sharded_tensor_for_checkpoint
from mtp_convert.models.megatron.ties import tie_word_embeddings_state_dict
from mtp_convert.models.megatron.transformer_block import LayerStack

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Prediction:
    """One forward pass; hidden states are after their norm, entry d of a tuple belongs to MTP depth d."""

    logits: Tensor  # [B, S, V]; position i predicts token i + 1
    hidden: Tensor  # [B, S, H]
    mtp_hidden: tuple[Tensor, ...]  # each [B, S, H]
    mtp_logits: tuple[Tensor, ...]  # each [B, S, V]; position i of depth d predicts token i + d + 2


class LanguageModel(MegatronModule, ABC):
    """One pipeline stage of a model; without groups, all of it.

    The first stage holds the embedding, the last the output layer, and the stage with the MTP layers a copy of the
    embedding. Stages run on whole tensors: every group but the pipeline's must be of one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, pg_collection)
        groups, virtual = self.pg_collection, config.virtual_pipeline_model_parallel_size or 1
        if groups.pp.size() != config.pipeline_model_parallel_size:
            raise ValueError(
                f"the model has {config.pipeline_model_parallel_size} pipeline ranks, the group {groups.pp.size()}"
            )
        self.vp_stage = vp_stage
        self.pre_process = groups.pp.rank() == 0 and not vp_stage
        self.post_process = groups.pp.rank() == groups.pp.size() - 1 and (vp_stage or 0) == virtual - 1
        with use_groups(groups):
            mtp_spec = self._mtp_spec()
        self.mtp_process = mtp_spec is not None
        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(config, groups)
        self.decoder = self._build_decoder()
        if mtp_spec is not None:
            if config.enable_hyper_connections and self.decoder.norm_name is None:
                raise ValueError("MTP layers need the streams of the last decoder layer, which is on another stage")
            self.mtp = MultiTokenPredictionBlock(config, mtp_spec, vp_stage, groups)
        if self.post_process:
            own = not (config.share_embeddings_and_output_weights and self.pre_process)
            self.output_layer = OutputLayer(config, groups, allocate=own)

    @abstractmethod
    def _build_decoder(self) -> LayerStack:
        """The layers of this stage."""

    @abstractmethod
    def _mtp_spec(self) -> MultiTokenPredictionBlockSubmodules | None:
        """The MTP layers of this stage."""

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Give a later stage the output [S, B, H] of the stage before it."""
        self.decoder.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """This stage's copy of a weight [V, H] that embedding and output layer share."""
        if self.pre_process or self.mtp_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Logits [B, S, V], the loss per token [B, S] if there are `labels`, or a stage's hidden states [S, B, H].

        `input_ids` and `position_ids` are [B, S]; `decoder_input` [S, B, H] takes the embeddings' place. The MTP loss
        is attached to what comes back, see `process_mtp_loss`. ValueError on groups that would have to communicate.
        """
        hidden = self.hidden_states(
            input_ids, position_ids, attention_mask, decoder_input, packed_seq_params=packed_seq_params
        )
        if not self.post_process:
            return hidden
        weight = self._output_weight()
        if self.config.mtp_num_layers:
            hidden = self._main_with_mtp_loss(
                hidden, input_ids, labels, loss_mask, packed_seq_params, weight, runtime_gather_output
            )
        logits, _ = self.output_layer(hidden, weight=weight, runtime_gather_output=runtime_gather_output)
        result: Tensor = logits.transpose(0, 1).contiguous() if labels is None else language_model_loss(labels, logits)
        return result

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """This stage's output [S, B, H], and those of all depths behind it where MTP layers are [(1 + D) * S, B, H].

        With hyper-connections the stages before the last decoder layer give streams [S, B, n * H].
        """
        self._check_groups()
        places = token_positions(input_ids.shape[1], packed_seq_params, input_ids.device)
        if position_ids is None:
            position_ids = places.expand_as(input_ids)
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        angles = None
        if self.config.position_embedding_type == "rope" and not self.config.multi_latent_attention:
            angles = rotary_angles(places, self.config)
        run = (decoder_input, attention_mask, angles, packed_seq_params, input_ids)
        streams = self.decoder.run_layers(*run) if self.config.enable_hyper_connections else None
        hidden: Tensor = self.decoder(*run) if streams is None else self.decoder.finish(streams)
        if self.mtp_process:
            hidden = self.mtp(
                input_ids,
                position_ids,
                hidden,
                attention_mask,
                rotary_pos_emb=angles,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
                mhc_multistream=streams,
            )
        return hidden

    def predict(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Prediction:
        """Everything that a whole model computes for `input_ids` [B, S]; ValueError on a pipeline stage."""
        if not (self.pre_process and self.post_process):
            raise ValueError("a pipeline stage cannot predict by itself")
        hidden = self.hidden_states(input_ids, packed_seq_params=packed_seq_params)
        parts = 1 + (self.config.mtp_num_layers or 0)
        states, scores = (tuple(x.transpose(0, 1) for x in both.chunk(parts)) for both in (hidden, self.logits(hidden)))
        return Prediction(scores[0], states[0], states[1:], scores[1:])

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, which MTP layers share: [S, B, H] -> [S, B, V]."""
        scores: Tensor = self.output_layer(hidden, weight=self._output_weight())[0]
        return scores

    def _main_with_mtp_loss(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        weight: Tensor | None,
        runtime_gather_output: bool | None,
    ) -> Tensor:
        """The main hidden states [S, B, H], tied to the MTP loss where that can matter."""
        if not (self.training or torch.is_grad_enabled()):
            return hidden.chunk(1 + (self.config.mtp_num_layers or 0))[0]
        with use_groups(self.pg_collection):
            return process_mtp_loss(
                hidden,
                labels,
                loss_mask,
                self.output_layer,
                weight,
                runtime_gather_output,
                self.training,
                language_model_loss,
                self.config,
                self.pg_collection.cp,
                self.pg_collection.tp,
                packed_seq_params,
                input_ids=input_ids,
            )

    def _output_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.config.share_embeddings_and_output_weights else None

    def _check_groups(self) -> None:
        groups = self.pg_collection
        sizes = {"tensor": groups.tp.size(), "context": groups.cp.size(), "expert": groups.ep.size()}
        if cut := [f"{name} {size}" for name, size in sizes.items() if size > 1]:
            raise ValueError(f"models run on whole tensors, got parallel sizes {', '.join(cut)}")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Offset] = (), metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """As every module's. Copies of the embedding are stored under its key, as replicas that are never written."""
        metadata = self.complete(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        groups = {"tp_group": self.pg_collection.tp, "dp_cp_group": metadata["dp_cp_group"]}
        embedding, output = f"{prefix}{_EMBEDDING}", f"{prefix}{_OUTPUT}"
        if self.mtp_process and not self.pre_process:
            tie_word_embeddings_state_dict(entries, self.embedding.word_embeddings.weight, embedding, **groups)
        if output in entries and self.config.share_embeddings_and_output_weights:
            copy = make_tp_sharded_tensor_for_checkpoint(
                entries[output].data, embedding, replica_id=(1, 0, metadata["dp_cp_group"].rank()), **groups
            )
            entries[output] = replace(copy, allow_shape_mismatch=True)
        elif output in entries:
            entries[output] = replace(entries[output], allow_shape_mismatch=True)
        return entries
