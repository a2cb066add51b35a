"""DeepSeek-V4 with its MTP depths as one module tree that runs, trains and splits into pipeline stages.

Symbols: B rows, S positions, H hidden size, X hyper-connection streams, V vocabulary, D MTP depths.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from mtp_convert.models.deepseek_v4 import pipeline
from mtp_convert.models.deepseek_v4.backbone import DeepseekV4Backbone
from mtp_convert.models.deepseek_v4.batch import Batch, BatchArguments, Rotaries, make_batch, shift_ids
from mtp_convert.models.deepseek_v4.config import BackendConfig, ConfigSource, MoEConfig, read_config
from mtp_convert.models.deepseek_v4.initialize import init_weights
from mtp_convert.models.deepseek_v4.mtp import build_deepseek_v4_mtp, build_mtp_config_from_hf
from mtp_convert.models.deepseek_v4.precision import Float32Linear, KeepsFloat32, cast_weights
from mtp_convert.models.deepseek_v4.weights import load_folder, released_tensors
from mtp_convert.models.logits import keep_positions, keep_problems, next_token_loss


@dataclass(frozen=True)
class DeepseekV4CausalLMOutput:
    """What a forward pass of the whole model yields."""

    logits: Tensor  # [B, S or kept, V]; position i predicts token i + 1
    loss: Tensor | None = None  # mean cross entropy of the logits alone; MTP losses are the trainer's
    hidden_states: Tensor | None = None  # [B, S, H] after the final norm, if asked for
    mtp_per_depth_h: list[Tensor] | None = None  # D x [B, S, H] for the output head; position i of k predicts i + k + 2
    mtp_loss_scaling_factor: float | None = None  # set if the model has MTP


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of the model's constructor, all optional."""

    mtp_loss_scaling_factor: float
    num_nextn_predict_layers: int | None
    moe_config: MoEConfig | None
    backend: BackendConfig | None
    dtype: torch.dtype | None


class DeepseekV4ForCausalLM(KeepsFloat32):
    """transformers' DeepSeek-V4 backbone and the D MTP depths of its checkpoint.

    `state_dict` names the backbone as transformers does (`model.layers.{i}.*`, `lm_head.weight`) and MTP
    `mtp.layers.{k}.*` with the same names inside a layer. MTP runs in training mode, and in evaluation mode if
    `compute_mtp_in_eval` is set. Casting with `.to(dtype)` spares what must stay in float32.
    """

    compute_mtp_in_eval: bool = False

    def __init__(
        self,
        config: ConfigSource,
        *,
        mtp_loss_scaling_factor: float = 0.1,
        num_nextn_predict_layers: int | None = None,
        moe_config: MoEConfig | None = None,
        backend: BackendConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fresh weights; `dtype` defaults to the config's or float32, and `num_nextn_predict_layers` replaces its D.

        Raises ValueError if the config describes another architecture or contradicts itself.
        """
        super().__init__()
        self.config = read_config(config, num_nextn_predict_layers=num_nextn_predict_layers)
        self.backend = backend or BackendConfig()
        self.moe_config = moe_config or MoEConfig()
        dtype = dtype or _config_dtype(self.config)
        self.mtp_config = build_mtp_config_from_hf(self.config, loss_scaling_factor=mtp_loss_scaling_factor)
        self.model = DeepseekV4Backbone(self.config, self.moe_config, self.backend)
        head = Float32Linear if self.backend.float32_head else nn.Linear
        self.lm_head: nn.Module | None = head(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.mtp: nn.Module | None = None
        if self.mtp_config.enabled:
            rotary = self.model.rotary_emb
            self.mtp = build_deepseek_v4_mtp(
                self.config, self.mtp_config, self.backend, self.moe_config, dtype, rotary, rotary
            )
        cast_weights(self, dtype, self.backend)
        self.init_weights()

    @classmethod
    def from_config(cls, config: ConfigSource, **options: Unpack[ModelOptions]) -> Self:
        """A model with fresh weights."""
        return cls(config, **options)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Unpack[ModelOptions]) -> Self:
        """Load a Hugging Face folder: released names, those that transformers writes, or this tree's own.

        The model comes in evaluation mode, as transformers gives it.
        Raises ValueError that lists every tensor that is missing, unexpected, given twice or of another shape.
        """
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(folder, **options)
        load_folder(model, folder, config=model.config)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        *mtp_embed_inputs: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        **batch_kwargs: Unpack[BatchArguments],
    ) -> DeepseekV4CausalLMOutput | Tensor | tuple[Tensor, ...]:
        """Run the whole model, or this pipeline stage.

        Args:
            input_ids: [B, S]; on a later stage the streams [B, S, X, H] of the one before.
            *mtp_embed_inputs: on a later stage the D embeddings [B, S, H] that travel with the streams.
            position_ids: [B, S] or [1, S]; default: places within the row or document.
            labels: [B, S], equal to `input_ids` but -100 where ignored; shifted here, within documents.
            logits_to_keep: the last n positions alone (0: all), or the positions in this index tensor.
            output_hidden_states: also yield the hidden state after the final norm.
            **batch_kwargs: masks and documents, see `BatchArguments`.

        Returns:
            The output of a whole model. Of a stage: streams with D embeddings, or at the end logits with D hidden
            states, as a tuple; a bare tensor if there is no MTP.

        Raises ValueError for ids outside the vocabulary, labels that meet `logits_to_keep` or a stage, and
        arguments of other shapes.
        """
        first, last = self.model.embed_tokens is not None, self.lm_head is not None
        if labels is not None and not (first and last):
            raise ValueError("labels are given to a pipeline stage, but the loss of a pipeline is its schedule's")
        self._check_inputs(input_ids, mtp_embed_inputs, labels, logits_to_keep)
        streams = self.model.embed(input_ids) if first else input_ids
        batch = make_batch(
            self.config,
            Rotaries(main=self.model.rotary_emb, compress=self.model.rotary_emb),
            streams,
            input_ids=input_ids if first else None,
            position_ids=position_ids,
            **batch_kwargs,
        )
        streams = self.model(streams, batch)
        if first and last:
            return self._output(streams, input_ids, batch, labels, logits_to_keep, output_hidden_states)
        embeds = self._shifted_embeddings(input_ids, batch) if first else mtp_embed_inputs
        if not last:
            return (streams, *embeds) if embeds else streams
        logits = self._logits(self.model.collapse(streams), logits_to_keep)
        # The shapes that a stage yields are fixed beforehand, so MTP runs there in evaluation mode too.
        return (logits, *self.mtp(streams, embed_inputs=embeds, batch=batch)) if self.mtp else logits

    @property
    def num_mtp_depths(self) -> int:
        """D, also on stages that hold no MTP module."""
        return self.mtp_config.num_layers if self.mtp_config.enabled else 0

    def get_input_embeddings(self) -> nn.Module | None:
        """The token embedding [V, H]."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head [V, H], which MTP shares."""
        return self.lm_head

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fresh values for everything, and buffers on `buffer_device` (default: where they are)."""
        init_weights(self, std=self.config.initializer_range, buffer_device=buffer_device)

    def released_state(self) -> dict[str, Tensor]:
        """The weights under their released names, experts one by one; sorted, detached."""
        return released_tensors(self.state_dict())

    def customize_pipeline_stage_modules(
        self,
        module_names: Sequence[Sequence[str]],
        *,
        layers_prefix: str = "model.",
        text_model: nn.Module | None = None,
    ) -> list[list[str]]:
        """See `pipeline.stage_modules`."""
        return pipeline.stage_modules(self, module_names, layers_prefix=layers_prefix, text_model=text_model)

    def get_pipeline_stage_metas(
        self, is_first: bool, microbatch_size: int, seq_len: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `pipeline.stage_metas`."""
        return pipeline.stage_metas(
            self, is_first=is_first, microbatch_size=microbatch_size, seq_len=seq_len, dtype=dtype
        )

    def pipeline_stage(self, module_names: Iterable[str]) -> "DeepseekV4ForCausalLM":
        """See `pipeline.cut_stage`."""
        return pipeline.cut_stage(self, module_names)

    def _output(
        self,
        streams: Tensor,
        ids: Tensor,
        batch: Batch,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        keep_hidden: bool,
    ) -> DeepseekV4CausalLMOutput:
        hidden = self.model.collapse(streams)
        logits = self._logits(hidden, logits_to_keep)
        last = None if batch.documents is None else batch.documents.last
        predicted = None
        if self.mtp is not None and (self.training or self.compute_mtp_in_eval):
            predicted = self.mtp(streams, input_ids=ids, embed_fn=self.model.embed_tokens, batch=batch)
        return DeepseekV4CausalLMOutput(
            logits=logits,
            loss=None if labels is None else next_token_loss(logits, labels, last),
            hidden_states=hidden if keep_hidden else None,
            mtp_per_depth_h=predicted,
            mtp_loss_scaling_factor=self.mtp_config.loss_scaling_factor if self.mtp is not None else None,
        )

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        assert self.lm_head is not None
        logits: Tensor = self.lm_head(keep_positions(hidden, keep))
        return logits.to(hidden.dtype)

    def _shifted_embeddings(self, ids: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        assert self.model.embed_tokens is not None
        embeds = []
        for _ in range(self.num_mtp_depths):
            ids = shift_ids(ids, batch.documents)
            embeds.append(self.model.embed_tokens(ids))
        return tuple(embeds)

    def _check_inputs(self, ids: Tensor, embeds: Sequence[Tensor], labels: Tensor | None, keep: int | Tensor) -> None:
        problems = keep_problems(keep, labels)
        if labels is not None and labels.shape != ids.shape:
            problems.append(f"labels have shape {tuple(labels.shape)}, expected {tuple(ids.shape)}")
        if problems:
            raise ValueError("; ".join(problems))
        if self.model.embed_tokens is not None:
            if embeds:
                raise ValueError(f"{len(embeds)} MTP embeddings are given to the first stage, which makes them")
            check_ids(ids, vocab=self.config.vocab_size)
            return
        if not ids.is_floating_point() or ids.dim() != 4 or ids.shape[2] != self.config.hc_mult:
            expected = f"streams [B, S, {self.config.hc_mult}, H] of the stage before"
            raise ValueError(f"a later stage is given {ids.dtype} {tuple(ids.shape)}, expected {expected}")
        if len(embeds) != self.num_mtp_depths:
            raise ValueError(f"a later stage is given {len(embeds)} MTP embeddings, expected {self.num_mtp_depths}")


def _config_dtype(config: DeepseekV4Config) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def check_ids(ids: Tensor, *, vocab: int) -> None:
    """Raise ValueError unless `ids` is [B, S] of integers within the vocabulary."""
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids is {ids.dtype} {tuple(ids.shape)}, expected integers [B, S]")
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        raise ValueError(
            f"input_ids has {int(outside.sum())} of {ids.numel()} ids outside 0..{vocab - 1} "
            f"(lowest {int(ids.min())}, highest {int(ids.max())})"
        )
