"""One block: a norm, a mixer of one of four kinds, and the residual stream around both.

Symbols: B rows, S positions, H hidden size, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import NemotronHConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHMLP,
    NemotronHMoE,
    NemotronHRMSNorm,
    NemotronHTopkRouter,
)

from mtp_convert.models.nemotron_v3.batch import Batch
from mtp_convert.models.nemotron_v3.config import BlockType, Numerics
from mtp_convert.models.nemotron_v3.mamba import NemotronV3Mamba
from mtp_convert.models.nemotron_v3.precision import KeepsFloat32


class NemotronV3Block(nn.Module):
    """`x + mixer(norm(x))`; `mixer` is what `block_type` says."""

    def __init__(self, config: NemotronHConfig, layer_idx: int, block_type: BlockType, numerics: Numerics) -> None:
        super().__init__()
        self.block_type = block_type
        self.layer_idx = layer_idx
        self.residual_in_fp32 = numerics.residual_in_fp32 and config.residual_in_fp32
        self.gradient_checkpointing = False
        self.norm = make_norm(config)
        self.mixer = _make_mixer(config, layer_idx, block_type, numerics)

    def forward(self, hidden_states: Tensor, *, batch: Batch | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H].

        While training with `gradient_checkpointing`, activations inside are computed again for the backward pass.
        """
        return self._maybe_checkpointed(self._run, hidden_states, batch or Batch())

    def _maybe_checkpointed(self, run: Callable[..., Tensor], hidden_states: Tensor, batch: Batch) -> Tensor:
        if self.gradient_checkpointing and self.training and batch.cache is None:
            out: Tensor = checkpoint(run, hidden_states, batch, use_reentrant=False)
            return out
        return run(hidden_states, batch)

    def _run(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        normed = normalize(self.norm, hidden_states)
        mixed = self.mixer(normed, batch=batch) if self.block_type in ("mamba", "attention") else self.mixer(normed)
        total: Tensor = residual + mixed
        return total


class NemotronV3Attention(NemotronHAttention):
    """transformers' attention, which sees one document at a time where rows are packed."""

    def __init__(self, config: NemotronHConfig, layer_idx: int, numerics: Numerics) -> None:
        super().__init__(config, layer_idx)
        if numerics.attention_bias and config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                plain: nn.Linear = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features, bias=True))

    def forward(self, hidden_states: Tensor, *, batch: Batch) -> Tensor:  # type: ignore[override]
        """[B, S, H] -> [B, S, H]."""
        out: Tensor
        if batch.documents is None or batch.attention_mask is not None:
            out, _ = super().forward(hidden_states, batch.attention_mask, batch.cache)
            return out
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = (proj(hidden_states).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = self.o_proj(batch.documents.each(self._attend, *projected))
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One document, [1, length, heads, head size] each -> [1, length, H]. No [S, S] mask is ever made."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        dropout = float(self.attention_dropout) if self.training else 0.0
        out, _ = sdpa_attention_forward(self, query, key, value, None, dropout=dropout, scaling=self.scaling)
        return out.flatten(2)


class NemotronV3Router(KeepsFloat32, NemotronHTopkRouter):
    """transformers' router, with the choices that `Numerics` offers."""

    def __init__(self, config: NemotronHConfig, numerics: Numerics) -> None:
        super().__init__(config)
        self.numerics = numerics

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., H] -> logits [tokens, E], weights and indices of the chosen experts [tokens, K]."""
        zeroed = self.numerics.masked_groups == "zero" and self.num_group > 1
        raw_top1 = not self.numerics.normalize_top1 and self.top_k == 1
        if not zeroed and not raw_top1:
            out: tuple[Tensor, Tensor, Tensor] = super().forward(hidden_states)  # type: ignore[no-untyped-call]
            return out
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
        scores = logits.sigmoid()
        biased = scores + self.e_score_correction_bias
        if self.num_group > 1:
            biased = biased.masked_fill(~self._reachable(biased), 0.0 if zeroed else -torch.inf)
        chosen = biased.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.norm_topk_prob and not raw_top1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, chosen

    def _reachable(self, biased: Tensor) -> Tensor:
        """Bool [tokens, E]: experts of the groups whose two best scores have the largest sums."""
        grouped = biased.view(len(biased), self.num_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1, sorted=False).indices
        groups = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, best, True)
        return groups[:, :, None].expand_as(grouped).reshape_as(biased)


class NemotronV3MoE(NemotronHMoE):
    """transformers' experts behind `NemotronV3Router`."""

    def __init__(self, config: NemotronHConfig, layer_idx: int, numerics: Numerics) -> None:
        super().__init__(config, layer_idx)
        self.gate = NemotronV3Router(config, numerics)


def make_norm(config: NemotronHConfig) -> nn.Module:
    """An RMS norm over H."""
    norm: nn.Module = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    return norm


def normalize(norm: nn.Module, hidden: Tensor) -> Tensor:
    """`hidden`, possibly a float32 residual stream, normed in the type of the weights."""
    out: Tensor = norm(hidden.to(norm.get_parameter("weight").dtype))
    return out


def _make_mixer(config: NemotronHConfig, layer_idx: int, block_type: BlockType, numerics: Numerics) -> nn.Module:
    mixer: nn.Module
    if block_type == "mlp":
        mixer = NemotronHMLP(config)  # type: ignore[no-untyped-call]
    elif block_type in _MIXERS:
        mixer = _MIXERS[block_type](config, layer_idx, numerics)
    else:
        raise ValueError(f"block type {block_type!r}, expected one of {[*_MIXERS, 'mlp']}")
    return mixer


_MIXERS: dict[str, type[Any]] = {
    "mamba": NemotronV3Mamba,
    "attention": NemotronV3Attention,
    "moe": NemotronV3MoE,
}
