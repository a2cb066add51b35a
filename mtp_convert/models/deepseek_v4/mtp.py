"""DeepSeek-V4's MTP depths: streams of the backbone and the next token's embedding, through one more layer.

Symbols: B rows, S positions, H hidden size, X hyper-connection streams, D depths, N backbone layers.

Depth k reads the streams of depth k - 1 (depth 0: the backbone's, before its head and norm) and predicts token
i + k + 2 at position i. Ids are shifted by one more place at every depth; positions are not.
"""

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead, DeepseekV4RMSNorm

from mtp_convert.models.deepseek_v4.batch import BlockArguments, Rotaries, resolve_batch, shift_ids
from mtp_convert.models.deepseek_v4.config import (
    SLIDING,
    AttentionKind,
    BackendConfig,
    MoEConfig,
    attention_kinds,
)
from mtp_convert.models.deepseek_v4.initialize import init_weights
from mtp_convert.models.deepseek_v4.layer import DeepseekV4Block
from mtp_convert.models.deepseek_v4.precision import cast_weights
from mtp_convert.models.mtp import MTPConfig

_PATTERN = "*"  # one layer per depth


class DeepseekV4MTPBlock(DeepseekV4Block):
    """One MTP depth: fusion, a decoder layer, and its own collapse of the streams.

    Parameters beside the layer's: `enorm`, `hnorm`, `norm` [H]; `e_proj`, `h_proj` [H, H]; `hc_head` with
    `hc_fn` [X, X * H], `hc_base` [X], `hc_scale` [1]. `layer_idx` is N + k; the compress ratio of that layer is the
    config's, or 0 where its list ends before. The rotary modules are called like transformers', with `layer_type`
    "main" or "compress", and are shared: they appear in no state dict.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_idx: int,
        moe_config: MoEConfig,
        backend: BackendConfig,
        dtype: torch.dtype,
        rotary_emb: nn.Module,
        rotary_emb_compress: nn.Module,
    ) -> None:
        kinds = attention_kinds(config)
        kind = kinds[layer_idx] if layer_idx < len(kinds) else AttentionKind(SLIDING, 0)
        super().__init__(
            config,
            layer_idx,
            kind,
            hashed=False,
            route_padding=moe_config.route_padding != "never",
            moe_config=moe_config,
            backend=backend,
            rotary=rotary_emb_compress,
        )
        self.config = config
        self.rotaries = Rotaries(main=rotary_emb, compress=rotary_emb_compress)  # a dict, so no submodules
        hidden = config.hidden_size
        self.enorm = DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps)
        self.e_proj = nn.Linear(hidden, hidden, bias=False)
        self.h_proj = nn.Linear(hidden, hidden, bias=False)
        self.hc_head = DeepseekV4HyperHead(config)
        self.norm = DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps)
        cast_weights(self, dtype, backend)
        self.init_weights()

    def forward(
        self,
        hidden_states: Tensor,
        *,
        embed_input: Tensor,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **attn_kwargs: Unpack[BlockArguments],
    ) -> tuple[Tensor, Tensor]:
        """Run one depth; `attn_kwargs` are those of `BlockArguments`, among them `attention_mask`.

        Args:
            hidden_states: streams [B, S, X, H].
            embed_input: embeddings of the shifted ids [B, S, H].
            input_ids: unused, as MTP never chooses experts by token id; every layer of the family takes it.
            position_ids: [B, S] or [1, S], not shifted.

        Returns:
            The next depth's streams [B, S, X, H], and the hidden state [B, S, H] for the shared output head.
        """
        batch = resolve_batch(self.config, self.rotaries, hidden_states, position_ids, attn_kwargs)
        streams = self.decode(self.fuse(hidden_states, embed_input), batch)
        return streams, self.norm(self.hc_head(streams))

    def fuse(self, hidden_states: Tensor, embed_input: Tensor) -> Tensor:
        """What the layer continues: every stream of [B, S, X, H] with the embedding [B, S, H]."""
        fused: Tensor = self.e_proj(self.enorm(embed_input)).unsqueeze(-2) + self.h_proj(self.hnorm(hidden_states))
        return fused

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fresh values, and buffers on `buffer_device` (default: where they are)."""
        init_weights(self, std=self.config.initializer_range, buffer_device=buffer_device)


class DeepseekV4MTPModule(nn.Module):
    """All MTP depths; with `use_repeated_layer` one stored depth that every depth runs.

    Raises ValueError if `mtp_config` is disabled or describes other than one layer per depth.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        mtp_config: MTPConfig,
        backend: BackendConfig,
        moe_config: MoEConfig,
        dtype: torch.dtype,
        rotary_emb: nn.Module,
        rotary_emb_compress: nn.Module,
    ) -> None:
        super().__init__()
        if not mtp_config.enabled or mtp_config.pattern_length != 1:
            raise ValueError(f"DeepSeek-V4 MTP has depths of one layer each, but the config says {mtp_config}")
        self.config = config
        self.mtp_config = mtp_config
        self.rotaries = Rotaries(main=rotary_emb, compress=rotary_emb_compress)  # a dict, so no submodules
        blocks = (
            DeepseekV4MTPBlock(
                config,
                config.num_hidden_layers + depth,
                moe_config,
                backend,
                dtype,
                rotary_emb,
                rotary_emb_compress,
            )
            for depth in range(mtp_config.num_physical_depths)
        )
        self.layers = nn.ModuleList(blocks)

    @property
    def num_depths(self) -> int:
        """D, the number of predictions; stored depths may be fewer."""
        return self.mtp_config.num_layers

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        embed_fn: Callable[[Tensor], Tensor] | None = None,
        embed_inputs: Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        **block_kwargs: Unpack[BlockArguments],
    ) -> list[Tensor]:
        """Predict hidden states [B, S, H] for every depth, each for the shared output head.

        Args:
            hidden_states: the backbone's streams [B, S, X, H], before its head and norm.
            input_ids: [B, S], not shifted; with `embed_fn`, which embeds the shifted ids.
            embed_fn: [B, S] ids -> [B, S, H].
            embed_inputs: instead of both, one embedding [B, S, H] of shifted ids per depth.
            position_ids: [B, S] or [1, S]; every depth gets them as they are.
            **block_kwargs: see `BlockArguments`.

        Raises ValueError if there are not exactly these embeddings, or the streams have another shape.
        """
        self._check(hidden_states, input_ids, embed_fn, embed_inputs)
        batch = resolve_batch(self.config, self.rotaries, hidden_states, position_ids, block_kwargs)
        predictions: list[Tensor] = []
        streams, shifted = hidden_states, input_ids
        for depth in range(self.num_depths):
            if embed_inputs is not None:
                embedded = embed_inputs[depth]
            else:
                assert shifted is not None  # see _check
                assert embed_fn is not None
                shifted = shift_ids(shifted, batch.documents)
                embedded = embed_fn(shifted)
            block = self.layers[depth % len(self.layers)]
            streams, prediction = block(streams, embed_input=embedded, batch=batch)
            predictions.append(prediction)
        return predictions

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fresh values in every depth."""
        for block in self.layers:
            assert isinstance(block, DeepseekV4MTPBlock)
            block.init_weights(buffer_device)

    def _check(self, streams: Tensor, ids: Tensor | None, embed_fn: object, embeds: Sequence[Tensor] | None) -> None:
        if streams.dim() != 4 or streams.shape[2] != self.config.hc_mult:
            expected = f"[B, S, {self.config.hc_mult}, H]"
            raise ValueError(f"hidden_states has shape {tuple(streams.shape)}, expected streams {expected}")
        if embeds is None:
            if ids is None or embed_fn is None:
                raise ValueError("MTP needs either embed_inputs or both input_ids and embed_fn")
            return
        if ids is not None or embed_fn is not None:
            raise ValueError("embed_inputs are given together with input_ids or embed_fn, expected one of the two")
        if len(embeds) != self.num_depths:
            raise ValueError(f"{len(embeds)} embed_inputs are given, expected one for each of {self.num_depths} depths")


def build_mtp_config_from_hf(config: object, *, loss_scaling_factor: float = 0.1) -> MTPConfig:
    """MTP settings of a DeepSeek-V4 config: `num_nextn_predict_layers` depths of one layer, never repeated."""
    depths = int(getattr(config, "num_nextn_predict_layers", 0) or 0)
    return MTPConfig(num_layers=depths, layer_pattern=_PATTERN, loss_scaling_factor=loss_scaling_factor)


def build_deepseek_v4_mtp(
    config: DeepseekV4Config,
    mtp_config: MTPConfig,
    backend: BackendConfig,
    moe_config: MoEConfig,
    dtype: torch.dtype,
    rotary_emb: nn.Module,
    rotary_emb_compress: nn.Module,
) -> DeepseekV4MTPModule:
    """The MTP depths of a model; both rotary arguments may be transformers' one module for both kinds.

    Raises ValueError if `mtp_config` is disabled.
    """
    return DeepseekV4MTPModule(config, mtp_config, backend, moe_config, dtype, rotary_emb, rotary_emb_compress)
