"""The backbone: embedding, blocks, final norm.

Symbols: B rows, S positions, H hidden size.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig

from mtp_convert.models.nemotron_v3.batch import Batch, make_batch
from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.config import BackendConfig, MoEConfig, Numerics, block_types, prepare_config
from mtp_convert.models.nemotron_v3.documents import PackedArguments
from mtp_convert.models.nemotron_v3.initialize import init_weights
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block, make_norm, normalize
from mtp_convert.models.nemotron_v3.precision import FLOAT32_LEAVES


class NemotronV3Model(nn.Module):
    """Mamba, attention, MLP and mixture-of-experts blocks in the order of the config.

    As a pipeline stage it may lack `embed_tokens` (None), `norm` (None) and any of `layers`, whose keys stay the
    numbers of the whole model.
    """

    _keep_in_fp32_modules_strict = sorted(FLOAT32_LEAVES)

    def __init__(
        self,
        config: NemotronHConfig,
        backend: BackendConfig | None = None,
        moe_config: MoEConfig | None = None,
        moe_overrides: Mapping[str, Any] | None = None,
        *,
        numerics: Numerics | None = None,
    ) -> None:
        """Fresh weights in float32. `moe_overrides` are fields of `MoEConfig`, by name.

        Raises ValueError if both MoE arguments are given, or the config describes what cannot run.
        """
        super().__init__()
        self.backend = backend or BackendConfig()
        self.numerics = numerics or Numerics()
        self.config, self.moe_config = prepare_config(
            config, backend=self.backend, moe_config=moe_config, moe_overrides=moe_overrides
        )
        self.embed_tokens: nn.Module | None = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(i): NemotronV3Block(self.config, i, kind, self.numerics)
                for i, kind in enumerate(block_types(self.config))
            }
        )
        self.norm: nn.Module | None = make_norm(self.config)
        init_weights(self, self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        causal_mask_mapping: Mapping[str, Tensor | None] | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: NemotronHybridCache | None = None,
        cache_position: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        batch: Batch | None = None,
        **packed: Unpack[PackedArguments],
    ) -> Tensor:
        """Hidden states [B, S, H], after the final norm if this stage has it; [S, H] if one row [S] is given.

        Args:
            input_ids: ids [B, S] or [S]; on a stage without embedding the hidden states [B, S, H] or [S, H].
            attention_mask: see `make_batch`.
            causal_mask_mapping: see `make_batch`.
            inputs_embeds: [B, S, H] or [S, H], used instead of `input_ids`.
            past_key_values: what went before; the new tokens are added.
            cache_position: accepted for generation loops; the cache counts its tokens itself.
            padding_mask: see `make_batch`.
            batch: all of the masks, documents and cache at once, if they are already read.
            packed: see `PackedArguments`.

        Raises ValueError if there is no input, it has the wrong type or shape, or the masks do not fit it.
        """
        hidden = self.embed(input_ids, inputs_embeds)
        one_row = hidden.dim() == 2
        hidden = hidden.unsqueeze(0) if one_row else hidden
        if batch is None:
            batch = make_batch(
                self.config,
                hidden,
                attention_mask=attention_mask,
                causal_mask_mapping=causal_mask_mapping,
                padding_mask=padding_mask,
                cache=past_key_values,
                packed=packed,
            )
        for block in self.layers.values():
            hidden = block(hidden, batch=batch)
        if batch.cache is not None:
            batch.cache.advance(hidden.shape[1])
        if self.norm is not None:
            hidden = normalize(self.norm, hidden)
        return hidden.squeeze(0) if one_row else hidden

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """What the first block of this stage reads; see `forward`."""
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is None:
            raise ValueError("either input_ids or inputs_embeds is needed, got neither")
        if self.embed_tokens is None:
            if not input_ids.is_floating_point():
                raise ValueError(f"a stage without embedding needs hidden states, got {input_ids.dtype}")
            return input_ids
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    @torch.no_grad()
    def initialize_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights of this stage anew, the buffers on `buffer_device` (None: where they are)."""
        redraw(self, self.config, buffer_device)


def redraw(root: nn.Module, config: NemotronHConfig, buffer_device: torch.device | None) -> None:
    """`init_weights` after moving the buffers; ValueError if weights have no memory yet."""
    if meta := [name for name, p in root.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{len(meta)} parameters are on the meta device ({meta[0]}, ..): call to_empty(device=...) first"
        )
    if buffer_device is not None:
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=buffer_device)
    init_weights(root, config)
