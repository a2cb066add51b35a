"""One DeepSeek-V4 layer on hyper-connection streams, from transformers' modules.

Symbols: B rows, S positions, H hidden size, X hyper-connection streams, E experts.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4HyperConnection,
    DeepseekV4RMSNorm,
    DeepseekV4SparseMoeBlock,
    DeepseekV4TopKRouter,
)

from mtp_convert.models.deepseek_v4.batch import Batch
from mtp_convert.models.deepseek_v4.config import HCA, AttentionKind, BackendConfig, MoEConfig
from mtp_convert.models.deepseek_v4.precision import Float32Linear


class RawScoreRouter(DeepseekV4TopKRouter):
    """transformers' router without the division by the sum of a token's expert weights."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, H] -> logits [B * S, E], and weights and experts [B * S, top_k]."""
        logits, _, experts = super().forward(hidden_states)
        weights = self.score_fn(logits).gather(1, experts)
        return logits, weights * self.routed_scaling_factor, experts


class DeepseekV4Block(nn.Module):
    """Attention and MoE around streams [B, S, X, H]; the parameter names are transformers'.

    The rotary module is shared with the whole model and no submodule: it has neither parameters nor state.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_idx: int,
        kind: AttentionKind,
        *,
        hashed: bool,
        route_padding: bool,
        moe_config: MoEConfig,
        backend: BackendConfig,
        rotary: nn.Module,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.route_padding = route_padding
        # transformers' modules look their layer up in the config's lists: give them lists of one.
        one = _one_layer(config, kind, hashed=hashed, backend=backend)
        self.self_attn = DeepseekV4Attention(one, layer_idx=0)
        self.mlp = DeepseekV4SparseMoeBlock(one, layer_idx=0)
        self.input_layernorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_hc = DeepseekV4HyperConnection(config)
        self.ffn_hc = DeepseekV4HyperConnection(config)
        if not hashed and not _normalizes(config, moe_config):
            self.mlp.gate = RawScoreRouter(config)
        if self.self_attn.compressor is not None:
            _share_rotary(self.self_attn.compressor, rotary)
            if backend.float32_compressor:
                _pool_in_float32(self.self_attn.compressor)

    def decode(self, streams: Tensor, batch: Batch) -> Tensor:
        """[B, S, X, H] -> [B, S, X, H].

        Raises ValueError if the layer chooses experts by token id and the batch has none.
        """
        post, comb, x_BSH = self.attn_hc(streams)
        streams = _expand(streams, post, comb, self._attend(self.input_layernorm(x_BSH), batch))
        post, comb, x_BSH = self.ffn_hc(streams)
        return _expand(streams, post, comb, self._feed_forward(self.post_attention_layernorm(x_BSH), batch))

    def _attend(self, x_BSH: Tensor, batch: Batch) -> Tensor:
        rows = x_BSH if batch.documents is None else batch.documents.unpack(x_BSH)
        out: Tensor = self.self_attn(
            rows,
            position_embeddings=batch.position_embeddings,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
        )[0]
        return out if batch.documents is None else batch.documents.pack(out)

    def _feed_forward(self, x_BSH: Tensor, batch: Batch) -> Tensor:
        ids, padding = batch.input_ids, batch.padding_mask
        if self.mlp.is_hash and ids is None:
            raise ValueError(f"layer {self.layer_idx} chooses experts by token id, but the batch has no input_ids")
        if self.route_padding or padding is None:
            routed: Tensor = self.mlp(x_BSH, input_ids=ids)
            return routed
        valid = ~padding
        out = torch.empty_like(x_BSH)
        kept_ids = None if ids is None else ids[valid].unsqueeze(0)
        out[valid] = self.mlp(x_BSH[valid].unsqueeze(0), input_ids=kept_ids).squeeze(0)
        out[padding] = self.mlp.shared_experts(x_BSH[padding])
        return out


class DeepseekV4Layer(DeepseekV4Block):
    """A layer of the backbone."""

    def forward(self, streams: Tensor, batch: Batch) -> Tensor:
        """[B, S, X, H] -> [B, S, X, H]; see `decode`."""
        return self.decode(streams, batch)


def _expand(streams: Tensor, post: Tensor, comb: Tensor, out_BSH: Tensor) -> Tensor:
    """Mix the streams by `comb` [B, S, X, X], read transposed, and add a module's output by `post` [B, S, X]."""
    dtype = streams.dtype
    mixed = torch.matmul(comb.to(dtype).transpose(-1, -2), streams)
    return post.to(dtype).unsqueeze(-1) * out_BSH.unsqueeze(-2) + mixed


def _one_layer(
    config: DeepseekV4Config, kind: AttentionKind, *, hashed: bool, backend: BackendConfig
) -> DeepseekV4Config:
    """A config whose only layer is this one."""
    one = copy.copy(config)
    one.layer_types = [kind.layer_type]
    one.mlp_layer_types = ["hash_moe" if hashed else "moe"]
    if kind.layer_type == HCA:
        one.compress_rates = {**(config.compress_rates or {}), HCA: kind.ratio}
    one._attn_implementation = "eager"  # the only one that knows the sinks
    one._experts_implementation = backend.experts
    return one


def _normalizes(config: DeepseekV4Config, moe_config: MoEConfig) -> bool:
    return moe_config.normalization == "always" or (config.norm_topk_prob and config.num_experts_per_tok > 1)


def _share_rotary(compressor: nn.Module, rotary: nn.Module) -> None:
    """Let a compressor, and its indexer, read the model's rotary module without owning it."""
    for module in compressor.modules():
        if "rotary_emb" in module._modules:
            del module.rotary_emb
            module.__dict__["rotary_emb"] = rotary


def _pool_in_float32(compressor: nn.Module) -> None:
    for module in compressor.modules():
        for name in ("kv_proj", "gate_proj"):
            if name in module._modules:
                old: nn.Linear = getattr(module, name)
                setattr(module, name, Float32Linear(old.in_features, old.out_features, bias=False))
    compressor.register_forward_hook(_cast_entries)


def _cast_entries(_: nn.Module, given: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Entries [B, 1, T, head_dim] of a compressor back to the dtype of its input."""
    return out[0].to(given[0].dtype), out[1]
