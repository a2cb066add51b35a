"""What compressed attention sees behind its window: keys that stand for a window of tokens each, and their choice.

Shape legend: S sequence, B batch, H hidden, W windows, R tokens per window, C channels of a head, A size of the
compressed query, X indexer heads, Y channels of an indexer head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import MegatronModule
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.rope import compressed_attention_angles, rotate_last
from mtp_convert.models.megatron.spec import build_module

SPARSE_RATIO = 4  # Megatron's layers of this ratio, and no others, have overlapping windows and an indexer


@dataclass(frozen=True, eq=False)
class Windows:
    """The complete windows of a row, cut from the first token of every packed sequence.

    `token_WR` are the places of their tokens, `position_W` says where in its sequence a window begins, and
    `visible_SW` is True where all of a window lies at or before a token of the same sequence.
    """

    token_WR: Tensor
    position_W: Tensor
    visible_SW: Tensor

    @classmethod
    def cut(cls, positions: Tensor, numbers: Tensor | None, ratio: int) -> Self:
        """From every token's position in its sequence and the number of that sequence, both [S]."""
        last_W = ((positions + 1) % ratio == 0).nonzero().squeeze(1)
        token_WR = last_W[:, None] + torch.arange(1 - ratio, 1, device=positions.device)
        visible_SW = last_W <= torch.arange(len(positions), device=positions.device)[:, None]
        if numbers is not None:
            visible_SW = visible_SW & (numbers[:, None] == numbers[last_W])
        return cls(token_WR, positions[last_W] + 1 - ratio, visible_SW)


@dataclass(frozen=True)
class CompressorSubmodules:
    """The modules inside a compressor, and around one in an indexer."""

    linear: Any
    norm: Any


class Compressor(MegatronModule):
    """Keys [W, B, C], weighted means of a window's tokens, normalised and rotated as the window's first token.

    With overlapping windows every token has two candidates: rows 0 to C - 1 of the linears are for the window after its
    own, rows C to 2C - 1 for its own, and a key is a mean over two windows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CompressorSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        ratio: int,
        head_dim: int,
    ) -> None:
        super().__init__(config, pg_collection)
        self.overlap = ratio == SPARSE_RATIO
        size = 2 * head_dim if self.overlap else head_dim
        shared: dict[str, Any] = {"config": config, "pg_collection": self.pg_collection}
        ape = torch.empty(ratio, size, dtype=torch.float32).normal_(std=config.init_method_std)
        self.ape = nn.Parameter(ape)  # of a token's place in its window
        self.linear_wkv = build_module(submodules.linear, config.hidden_size, size, **shared)
        self.linear_wgate = build_module(submodules.linear, config.hidden_size, size, **shared)
        self.norm = build_module(submodules.norm, config, head_dim, self.pg_collection)

    def forward(self, x_SBH: Tensor, windows: Windows) -> Tensor:
        """See the class."""
        kv_WRBC = self.linear_wkv(x_SBH)[windows.token_WR]
        gate_WRBC = widen(self.linear_wgate(x_SBH))[windows.token_WR] + self.ape[:, None]
        if self.overlap:
            kv_WRBC, gate_WRBC = _overlap(kv_WRBC, windows, 0.0), _overlap(gate_WRBC, windows, -math.inf)
        pooled_WBC = (widen(kv_WRBC) * gate_WRBC.softmax(1)).sum(1).to(x_SBH.dtype)
        angles = compressed_attention_angles(windows.position_W, self.config, compressed=True)
        return rotate_last(self.norm(pooled_WBC)[:, :, None], angles).squeeze(2)


def _overlap(x: Tensor, windows: Windows, fill: float) -> Tensor:
    """[W, 2R, B, C] of [W, R, B, 2C]: the window before, or `fill` if it is of another sequence, and the own one."""
    before, own = x.chunk(2, -1)
    first = (windows.position_W == 0)[:, None, None, None]
    return torch.cat((before.roll(1, 0).masked_fill(first, fill), own), 1)


class Indexer(MegatronModule):
    """Chooses, for every token, the `dsa_indexer_topk` windows to look at, by small heads and keys of its own.

    A choice has no gradient; Megatron trains indexers by a loss of their own. Megatron turns queries and keys by the
    same Hadamard matrix before they meet, which changes their rounding and not their products.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CompressorSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        ratio: int,
    ) -> None:
        super().__init__(config, pg_collection)
        self.heads, self.head_dim = config.dsa_indexer_n_heads, config.dsa_indexer_head_dim
        groups = self.pg_collection
        shared: dict[str, Any] = {"config": config, "pg_collection": groups}
        self.linear_wq_b = build_module(submodules.linear, config.q_lora_rank, self.heads * self.head_dim, **shared)
        self.linear_weights_proj = build_module(submodules.linear, config.hidden_size, self.heads, **shared)
        self.compressor = Compressor(config, submodules, groups, ratio=ratio, head_dim=self.head_dim)

    @torch.no_grad()
    def forward(self, x_SBH: Tensor, q_SBA: Tensor, angles: Tensor, windows: Windows) -> Tensor:
        """Bool [S, B, W]: the chosen windows, of those that are visible, of compressed queries `q_SBA`."""
        q_SBXY = rotate_last(torch.unflatten(self.linear_wq_b(q_SBA), -1, (self.heads, -1)), angles)
        k_WBY = self.compressor(x_SBH, windows)
        match_SBXW = torch.einsum("sbxy,wby->sbxw", widen(q_SBXY), widen(k_WBY)).relu() * self.head_dim**-0.5
        weight_SBX = widen(self.linear_weights_proj(x_SBH)) * self.heads**-0.5
        visible_SBW = windows.visible_SW[:, None]
        score_SBW = (match_SBXW * weight_SBX[..., None]).sum(2).masked_fill(~visible_SBW, -math.inf)
        best = score_SBW.topk(min(self.config.dsa_indexer_topk, score_SBW.shape[-1])).indices
        chosen_SBW = torch.zeros_like(score_SBW, dtype=torch.bool).scatter(-1, best, True)
        return chosen_SBW & visible_SBW
