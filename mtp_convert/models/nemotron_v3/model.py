"""Nemotron-V3 with its MTP depths as one module tree that runs, trains, generates and splits into pipeline stages.

Symbols: B rows, S positions, H hidden size, V vocabulary, D MTP depths that run.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, NemotronHConfig

from mtp_convert.models.logits import keep_positions, next_token_loss
from mtp_convert.models.nemotron_v3 import pipeline
from mtp_convert.models.nemotron_v3.backbone import NemotronV3Model, redraw
from mtp_convert.models.nemotron_v3.batch import Batch, causal_mask, make_batch
from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.config import BackendConfig, MoEConfig, Numerics, build_mtp_config_from_hf
from mtp_convert.models.nemotron_v3.documents import PackedArguments
from mtp_convert.models.nemotron_v3.generation import HybridGeneration
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block
from mtp_convert.models.nemotron_v3.mtp import make_mtp
from mtp_convert.models.nemotron_v3.outputs import (
    NemotronHCausalLMOutputWithPast,
    argument_problems,
    as_rows,
)
from mtp_convert.models.nemotron_v3.precision import FLOAT32_LEAVES
from mtp_convert.models.nemotron_v3.weights import load_folder, read_folder_config, released_tensors

__all__ = ["ModelClass", "ModelOptions", "NemotronHCausalLMOutputWithPast", "NemotronHForCausalLM", "NemotronV3Model"]


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of the model's constructor, all optional."""

    mtp_loss_scaling_factor: float
    num_nextn_predict_layers: int | None
    mtp_use_repeated_layer: bool
    numerics: Numerics | None
    moe_config: MoEConfig | None
    moe_overrides: Mapping[str, Any] | None


class NemotronHForCausalLM(HybridGeneration, nn.Module):
    """A backbone, its LM head and the MTP depths of its checkpoint.

    `state_dict` names: `model.embed_tokens.weight`, `model.layers.{i}.*`, `model.norm.weight`, `lm_head.weight`, and
    `mtp.layers.{f}.*` with f = depth * P + place in the depth; experts are stacked as in transformers. MTP runs in
    training mode, and in evaluation mode if `compute_mtp_in_eval` is set, but never with a cache. Casting with
    `.to(dtype)` spares what releases store in float32.
    """

    compute_mtp_in_eval: bool = False
    _is_stateful = True
    _keep_in_fp32_modules_strict = sorted(FLOAT32_LEAVES)
    _pp_keep_self_forward = True
    main_input_name = "input_ids"

    def __init__(
        self,
        config: NemotronHConfig,
        backend: BackendConfig | None = None,
        *,
        mtp_loss_scaling_factor: float = 0.1,
        num_nextn_predict_layers: int | None = None,
        mtp_use_repeated_layer: bool = False,
        numerics: Numerics | None = None,
        moe_config: MoEConfig | None = None,
        moe_overrides: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fresh weights of type `dtype` (None: the config's, or float32).

        `num_nextn_predict_layers` replaces the config's D; 0 leaves MTP out. With `mtp_use_repeated_layer` one stored
        depth runs D times. Other arguments are the backbone's.

        Raises ValueError if the config describes what cannot run.
        """
        super().__init__()
        self.model = NemotronV3Model(config, backend, moe_config, moe_overrides, numerics=numerics)
        self.config, self.backend, self.numerics = self.model.config, self.model.backend, self.model.numerics
        self.mtp_config = build_mtp_config_from_hf(
            self.config,
            loss_scaling_factor=mtp_loss_scaling_factor,
            num_nextn_predict_layers=num_nextn_predict_layers,
            use_repeated_layer=mtp_use_repeated_layer,
        )
        self.lm_head: nn.Module | None = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=self.config.initializer_range)
        self.mtp = make_mtp(self.config, self.mtp_config, numerics=self.numerics) if self.mtp_config.enabled else None
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self.to(dtype or (self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32))

    @classmethod
    def from_config(
        cls,
        config: NemotronHConfig,
        backend: BackendConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        **options: Unpack[ModelOptions],
    ) -> Self:
        """A model with fresh weights; arguments are the constructor's."""
        return cls(config, backend, dtype=dtype, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        backend: BackendConfig | None = None,
        *,
        config: NemotronHConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options: Unpack[ModelOptions],
    ) -> Self:
        """The model of a local folder in the Hugging Face layout, in evaluation mode.

        `config` replaces the folder's. `dtype` None keeps the stored types; a narrower one spares the parameters that
        releases keep in float32. Depths that `num_nextn_predict_layers` leaves out are not read. Other arguments are
        the constructor's.

        Raises ValueError if it is no folder, or with every tensor that is missing, unexpected or has another shape.
        """
        folder, config = read_folder_config(pretrained_model_name_or_path, config)
        with torch.device("meta"):
            model = cls(config, backend, **options)
        load_folder(model, folder, dtype=dtype, device=torch.device(device))
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *mtp_embed_inputs: Tensor,
        attention_mask: Tensor | None = None,
        causal_mask_mapping: Mapping[str, Tensor | None] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: NemotronHybridCache | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packed: Unpack[PackedArguments],
    ) -> Any:  # noqa: ANN401 - stages yield tensors
        """A whole model gives `NemotronHCausalLMOutputWithPast`, a pipeline stage what `pipeline` says.

        Masks and `packed` are explained at `make_batch`. `position_ids`, `cache_position` and `return_dict` are
        accepted for callers that always give them; nothing here depends on positions, and outputs are objects.

        Args:
            input_ids: [B, S], or one row [S], which counts as [1, S]; on later stages hidden states [B, S, H].
            mtp_embed_inputs: on later stages the D embeddings [B, S, H] of the stage before.
            inputs_embeds: [B, S, H], used instead of `input_ids`; MTP then reads them k + 1 places to the left,
                followed by zeros instead of the embedding of token 0.
            labels: [B, S], not shifted; there is no loss where they are -100, nor across documents.
            past_key_values: a cache to continue; `use_cache` without one begins one.
            logits_to_keep: n > 0: only the last n positions; a tensor: these positions; 0: all.
            output_hidden_states: return the final hidden states (None: as the config says).

        Raises ValueError if arguments do not fit each other.
        """
        hidden = as_rows(self.model.embed(input_ids, inputs_embeds), 3)
        stage = self._is_pipeline_parallel_stage()
        problems = argument_problems(labels, logits_to_keep, length=hidden.shape[1], stage=stage)
        if problems := [*problems, *pipeline.stage_problems(self, mtp_embed_inputs, stage=stage)]:
            raise ValueError("; ".join(problems))
        batch = make_batch(
            self.config,
            hidden,
            attention_mask=attention_mask,
            causal_mask_mapping=causal_mask_mapping,
            padding_mask=padding_mask,
            cache=self.new_cache() if use_cache and past_key_values is None else past_key_values,
            packed=packed,
        )
        embedded = None if inputs_embeds is None else hidden
        ahead = mtp_embed_inputs or self._embeddings_ahead(input_ids, embedded, batch, stage=stage)
        hidden = self.model(inputs_embeds=hidden, batch=batch)
        if stage:
            return pipeline.stage_output(self, hidden, ahead, batch, logits_to_keep)
        output = self._output(hidden, ahead, batch, labels, logits_to_keep)
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            output.hidden_states = (hidden,)
        return output

    @property
    def num_mtp_depths(self) -> int:
        """D, also on stages that hold no MTP module."""
        return self.mtp_config.num_layers if self.mtp_config.enabled else 0

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first parameter."""
        return next(self.parameters()).dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head, which MTP shares: [.., H] -> [.., V]."""
        assert self.lm_head is not None, "this stage has no LM head"
        logits: Tensor = self.lm_head(hidden)
        return logits.float() if self.numerics.float32_logits else logits

    def get_input_embeddings(self) -> nn.Module | None:
        """The token embedding [V, H]."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The LM head [V, H]."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace it."""
        self.lm_head = new_embeddings

    def released_state(self) -> dict[str, Tensor]:
        """The weights under their released names, experts one by one; sorted, detached."""
        return released_tensors(self.state_dict())

    @torch.no_grad()
    def initialize_weights(
        self, buffer_device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Draw all weights of this model or stage anew, see `init_weights`, and cast it to `dtype`.

        Buffers go to `buffer_device` (None: they stay). Raises ValueError if weights are on the meta device.
        """
        redraw(self, self.config, buffer_device)
        self.to(dtype)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute activations inside blocks again for the backward pass; no keyword arguments are read."""
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self._checkpoint(False)

    def customize_pipeline_stage_modules(
        self,
        module_names_per_stage: Sequence[Sequence[str]],
        *,
        layers_prefix: str = "model.",
        text_model: nn.Module | None = None,
    ) -> list[list[str]]:
        """See `pipeline.stage_modules`."""
        return pipeline.stage_modules(self, module_names_per_stage, layers_prefix=layers_prefix, text_model=text_model)

    def get_pipeline_stage_metas(
        self, is_first: bool, microbatch_size: int, seq_len: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `pipeline.stage_metas`."""
        return pipeline.stage_metas(
            self, is_first=is_first, microbatch_size=microbatch_size, seq_len=seq_len, dtype=dtype
        )

    def pipeline_stage(self, module_names: Iterable[str]) -> "NemotronHForCausalLM":
        """See `pipeline.cut_stage`."""
        return pipeline.cut_stage(self, module_names)

    def _is_pipeline_parallel_stage(self) -> bool:
        return pipeline.is_stage(self)

    def _build_mtp_embed_inputs_for_pp(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return pipeline.embeddings_ahead(self, input_ids)

    @staticmethod
    def _make_causal_mask(
        query_len: int, kv_len: int, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return causal_mask(query_len, kv_len, rows=batch_size, dtype=dtype, device=device)

    def _checkpoint(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, NemotronV3Block):
                module.gradient_checkpointing = enabled

    def _embeddings_ahead(
        self, input_ids: Tensor | None, embedded: Tensor | None, batch: Batch, *, stage: bool
    ) -> tuple[Tensor, ...]:
        """What the depths of this stage or of the last one read; nothing if none of them runs."""
        if self._mtp_runs(batch) or pipeline.must_embed_ahead(self, stage=stage):
            return pipeline.embeddings_ahead(self, input_ids, embedded)
        return ()

    def _mtp_runs(self, batch: Batch) -> bool:
        return self.mtp is not None and batch.cache is None and (self.training or self.compute_mtp_in_eval)

    def predict_ahead(self, hidden: Tensor, embeds: Sequence[Tensor], batch: Batch) -> list[Tensor] | None:
        """What the depths compute from `hidden` and D `embeds`, all [B, S, H]; None if they are not to run."""
        if self.mtp is None or not self._mtp_runs(batch):
            return None
        predicted: list[Tensor] = self.mtp(hidden, embed_inputs=embeds, batch=batch)
        return predicted

    def _output(
        self, hidden: Tensor, ahead: Sequence[Tensor], batch: Batch, labels: Tensor | None, keep: int | Tensor
    ) -> NemotronHCausalLMOutputWithPast:
        logits = self.logits(keep_positions(hidden, keep))
        predicted = self.predict_ahead(hidden, ahead, batch)
        last = None if batch.documents is None else batch.documents.last_positions()
        return NemotronHCausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, as_rows(labels, 2), last),
            logits=logits,
            past_key_values=batch.cache,
            mtp_per_depth_h=predicted,
            mtp_loss_scaling_factor=None if predicted is None else self.mtp_config.loss_scaling_factor,
        )


ModelClass = NemotronHForCausalLM
