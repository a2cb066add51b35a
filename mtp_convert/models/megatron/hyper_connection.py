"""Hyper-connections: several residual streams instead of one, mixed anew around every block.

Shape legend: S sequence, B batch, H hidden, n streams. Between blocks the streams of a token lie behind one another,
[S, B, n * H]. What decides the mixing is float32 at least, parameters included, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule
from mtp_convert.models.megatron.norms import unit_rms, widen


def expand(hidden_states: Tensor, config: TransformerConfig) -> Tensor:
    """The first streams [S, B, n * H], all of them `hidden_states` [S, B, H]."""
    return hidden_states.repeat(1, 1, config.num_residual_streams)


def sinkhorn(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    """Positive matrices [..., n, n] whose columns sum to one, and whose rows do so the closer the more `iterations`."""
    matrix = logits.softmax(-1) + epsilon
    matrix = matrix / (matrix.sum(-2, keepdim=True) + epsilon)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + epsilon)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + epsilon)
    return matrix


def _direction(streams: Tensor, weight: Tensor, config: TransformerConfig) -> Tensor:
    """`weight` [x, n * H] applied to all streams of a token at once, at unit RMS: [S, B, x].

    Megatron-Core's development branch has 1e-6 here whatever the model's epsilon is; released models have that anyway.
    """
    wide = widen(streams)
    return F.linear(unit_rms(wide, config.layernorm_epsilon), weight.to(wide.dtype))


class HyperConnection(MegatronModule):
    """The streams around one block: what it reads of them, and what they become.

    Every token has n weights for what the block reads, n factors for what it writes, and an n x n matrix that mixes the
    streams: the rows of `mapping_proj` and `bias` in this order, each kind with a scale (`alpha_*`) of its own.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        n = config.num_residual_streams
        self.sizes = [n, n, n * n]
        self.alpha_pre, self.alpha_post, self.alpha_res = (
            nn.Parameter(torch.full((1,), config.mhc_init_gating_factor, dtype=torch.float32)) for _ in self.sizes
        )
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes), dtype=torch.float32))
        self.mapping_proj = nn.Linear(n * config.hidden_size, sum(self.sizes), bias=False, dtype=torch.float32)
        nn.init.xavier_uniform_(self.mapping_proj.weight)

    def forward(self, streams: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Streams [S, B, n * H] after `block`, a map of [S, B, H], from those before."""
        read_SBn, write_SBn, mix_SBnn = (weights.to(streams.dtype) for weights in self.mappings(streams))
        x_SBnH = torch.unflatten(streams, -1, (self.config.num_residual_streams, -1))
        written_SBH = block((read_SBn[..., None] * x_SBnH).sum(2))
        mixed_SBnH = mix_SBnn.transpose(-1, -2) @ x_SBnH
        return (write_SBn[..., None] * written_SBH[:, :, None] + mixed_SBnH).flatten(2)

    def mappings(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights to read [S, B, n] and to write [S, B, n], and the mixing matrix [S, B, n, n] of `streams`."""
        config, n = self.config, self.config.num_residual_streams
        parts = torch.split(_direction(streams, self.mapping_proj.weight, config), self.sizes, -1)
        alphas = (self.alpha_pre, self.alpha_post, self.alpha_res)
        biases = torch.split(self.bias, self.sizes)
        read, write, mix = (part * a + bias for part, a, bias in zip(parts, alphas, biases, strict=True))
        matrix = sinkhorn(torch.unflatten(mix, -1, (n, n)), config.mhc_sinkhorn_iterations, config.mhc_epsilon)
        return read.sigmoid() + config.mhc_epsilon, 2 * write.sigmoid(), matrix


class StreamHead(MegatronModule):
    """A module at whose end the streams become one, by weights of every token; `add_head` makes what decides them."""

    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter

    def add_head(self) -> None:
        """Register the parameters, all float32."""
        n = self.config.num_residual_streams
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * self.config.hidden_size, dtype=torch.float32))
        self.hc_head_base = nn.Parameter(torch.zeros(n, dtype=torch.float32))
        self.hc_head_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        nn.init.xavier_uniform_(self.hc_head_fn)

    def contract(self, streams: Tensor) -> Tensor:
        """[S, B, H] of the streams [S, B, n * H]."""
        scores_SBn = _direction(streams, self.hc_head_fn, self.config) * self.hc_head_scale + self.hc_head_base
        weight_SBn = scores_SBn.sigmoid() + self.config.mhc_epsilon
        x_SBnH = torch.unflatten(widen(streams), -1, (self.config.num_residual_streams, -1))
        return (weight_SBn[..., None] * x_SBnH).sum(2).to(streams.dtype)
