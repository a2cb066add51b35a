"""Mixture of experts: a router, routed experts (in a latent space, if there is one), and a shared expert.

Shape legend: S sequence, B batch, T = S * B tokens, H hidden, L what experts see (latent, or H), E experts, K experts
per token, G expert groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.experts import Experts
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.linear import TELinear
from mtp_convert.models.megatron.mlp import MLP, MLPSubmodules
from mtp_convert.models.megatron.module import MegatronModule, fresh
from mtp_convert.models.megatron.norms import widen
from mtp_convert.models.megatron.spec import build_module

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


class TopKRouter(MegatronModule):
    """Chooses K experts per token. Scores are float32 at least; the bias, always float32, steers the choice alone."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        experts = config.num_moe_experts or 0
        self.weight = fresh(experts, config.hidden_size, config=config)
        self.bias = nn.Parameter(torch.zeros(experts, dtype=config.params_dtype)) if config.add_bias_linear else None
        self.expert_bias: Tensor | None
        bias = torch.zeros(experts, dtype=torch.float32) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_TH: Tensor, ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [T, K], experts [T, K]) of hidden states; token ids matter to routers that choose by them alone."""
        config, bias = self.config, None if self.bias is None else widen(self.bias)
        logits_TE = F.linear(widen(x_TH), widen(self.weight), bias)
        if config.moe_router_score_function == "softmax":
            weight_TK, expert_TK = self._softmax(logits_TE, ids_T)
        else:
            score_TE = _SCORES[config.moe_router_score_function](logits_TE)
            expert_TK = self._choose(score_TE if self.expert_bias is None else score_TE + self.expert_bias, ids_T)
            weight_TK = score_TE.gather(1, expert_TK)
            if config.moe_router_topk > 1:
                weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK * (config.moe_router_topk_scaling_factor or 1.0), expert_TK

    def _softmax(self, logits_TE: Tensor, ids_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Over all experts before the choice (`pre_softmax`), or over the chosen ones after it."""
        score_TE = logits_TE.softmax(-1) if self.config.moe_router_pre_softmax else logits_TE
        expert_TK = self._choose(score_TE, ids_T)
        score_TK = score_TE.gather(1, expert_TK)
        return score_TK if self.config.moe_router_pre_softmax else score_TK.softmax(-1), expert_TK

    def _choose(self, score_TE: Tensor, ids_T: Tensor | None) -> Tensor:
        """The best experts [T, K], of the best groups only if there are groups."""
        config = self.config
        if config.moe_router_num_groups and config.moe_router_group_topk:
            score_TGe = torch.unflatten(score_TE, 1, (config.moe_router_num_groups, -1))
            # A group counts as much as its best topk // group_topk experts; Hugging Face always takes the best two.
            best = config.moe_router_topk // config.moe_router_group_topk
            group_TG = score_TGe.topk(best).values.sum(-1)
            kept = group_TG.topk(config.moe_router_group_topk).indices
            barred_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept, False)
            score_TE = score_TGe.masked_fill(barred_TG[..., None], -math.inf).flatten(1)
        return score_TE.topk(config.moe_router_topk).indices


class HashRouter(TopKRouter):
    """Experts by token id, from a table [V, K] that is not trained; the scores only weigh them."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        self.expert_bias = None
        ids, slots = torch.arange(config.actual_vocab_size), torch.arange(config.moe_router_topk)
        self.tid2eid: Tensor
        self.register_buffer("tid2eid", ((ids[:, None] + slots) % (config.num_moe_experts or 1)).int())

    def _choose(self, score_TE: Tensor, ids_T: Tensor | None) -> Tensor:
        if ids_T is None:
            raise ValueError("this layer chooses experts by token id, got no ids")
        expert_TK: Tensor = self.tid2eid[ids_T].long()
        return expert_TK


class SharedExpertMLP(MLP):
    """The expert that every token passes, with a gate of its own if the model has one."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection, inner=config.moe_shared_expert_intermediate_size)
        self.gate_weight = fresh(1, config.hidden_size, config=config) if config.moe_shared_expert_gate else None

    def forward(self, hidden_states: Tensor, weights: Tensor | None = None) -> Tensor:
        """[..., H] of [..., H]."""
        output = super().forward(hidden_states, weights)
        if self.gate_weight is None:
            return output
        return output * F.linear(hidden_states, self.gate_weight).sigmoid()


@dataclass(frozen=True)
class MoESubmodules:
    """The modules inside a mixture of experts."""

    experts: Any
    shared_experts: Any


class MoELayer(MegatronModule):
    """Router, experts, shared experts; runs on whole tensors and all experts. `hashed` layers route by token id."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        hashed: bool = False,
    ) -> None:
        super().__init__(config, pg_collection)
        groups = self.pg_collection
        self.router = (HashRouter if hashed else TopKRouter)(config, groups)
        if config.moe_latent_size:
            shared: dict[str, Any] = {"config": config, "bias": config.add_bias_linear, "pg_collection": groups}
            self.fc1_latent_proj = TELinear(config.hidden_size, config.moe_latent_size, **shared)
            self.fc2_latent_proj = TELinear(config.moe_latent_size, config.hidden_size, **shared)
        self.experts: Experts = build_module(submodules.experts, config, pg_collection=groups)
        if config.moe_shared_expert_intermediate_size is not None:
            self.shared_experts = build_module(submodules.shared_experts, config, pg_collection=groups)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """[S, B, H] of [S, B, H]; routing by token id needs the ids [B, S]."""
        config, x_TH = self.config, hidden_states.flatten(0, 1)
        weight_TK, expert_TK = self.router(x_TH, None if input_ids is None else input_ids.t().flatten())
        x_TL = self.fc1_latent_proj(x_TH) if config.moe_latent_size else x_TH
        y_TL = torch.zeros_like(x_TL)
        for expert in expert_TK.unique().tolist():
            token, slot = (expert_TK == expert).nonzero(as_tuple=True)
            y_TL.index_add_(0, token, self.experts(x_TL[token], expert, weight_TK[token, slot]))
        y_TH = self.fc2_latent_proj(y_TL) if config.moe_latent_size else y_TL
        output: Tensor = y_TH.view_as(hidden_states)
        if config.moe_shared_expert_intermediate_size is not None:
            output = output + self.shared_experts(hidden_states)
        return output
