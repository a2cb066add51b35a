"""Megatron-Core's HybridModel with MTP in plain PyTorch, on weights under torch_dist key names.

This is the Megatron side of a parity check, so it knows those names and their meaning by itself and
shares no table with the converter. Written after megatron-core 0.19.2 (`models/hybrid`,
`ssm/mamba_mixer.py`, `transformer/moe`, `transformer/multi_token_prediction.py`) and checked on its
outputs. Forward only, whole tensors, one process, no caches.

Shape legend: B batch, S sequence, T = B*S tokens, H hidden, V vocabulary
  attention: G query groups, Q query heads per group, C channels per head
  experts:   E experts, K experts per token, F inner size, L size the experts see (latent, or H)
  Mamba2:    N heads, P channels per head, I = N*P, R state size, U groups, W conv kernel
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_convert.models._hybrid_settings import HybridSettings

__all__ = ["HybridOutput", "HybridSettings", "MegatronHybrid", "checkpoint_keys"]

# MambaMixer builds its gated norm with this number whatever layernorm_epsilon says.
_MAMBA_NORM_EPSILON = 1e-5

_ATTENTION = ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight")
_DENSE = ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight")
_ROUTED = (
    "router.weight",
    "router.expert_bias",
    "experts.experts.linear_fc1.weight",
    "experts.experts.linear_fc2.weight",
)
_SHARED = ("shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight")
_LATENT = ("fc1_latent_proj.weight", "fc2_latent_proj.weight")
_MAMBA = (
    "in_proj.layer_norm_weight",
    *(f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")),
    *(f"conv1d.{kind}.{part}" for kind in ("weight", "bias") for part in ("x", "B", "C")),
    *("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"),
)


@dataclass(frozen=True, slots=True)
class HybridOutput:
    """One forward pass; the MTP tuples hold depth 1, 2, ...; hidden states are after their norm."""

    logits: Tensor  # [B,S,V]
    hidden: Tensor  # [B,S,H]
    mtp_hidden: tuple[Tensor, ...]  # [B,S,H] each
    mtp_logits: tuple[Tensor, ...]  # [B,S,V] each


def checkpoint_keys(settings: HybridSettings) -> frozenset[str]:
    """Every tensor key that Megatron-Core 0.17+ stores for this model (no `_extra_state`)."""
    keys = {"embedding.word_embeddings.weight", "decoder.final_norm.weight"}
    if not settings.tied_embeddings:
        keys.add("output_layer.weight")
    keys.update(_stack_keys(settings, settings.pattern, root="decoder."))
    for layer in range(settings.mtp_stored_layers):
        root = f"mtp.layers.{layer}."
        keys.update(f"{root}{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "final_layernorm"))
        keys.update(_stack_keys(settings, settings.mtp_pattern, root=f"{root}mtp_model_layer."))
    return frozenset(keys)


def _stack_keys(settings: HybridSettings, pattern: str, *, root: str) -> Iterator[str]:
    moe = _ROUTED + (_SHARED if settings.moe_shared_expert else ())
    moe += _LATENT if settings.moe_latent_size else ()
    names = {
        "M": [f"mixer.{n}" for n in _MAMBA],
        "*": [f"self_attention.{n}" for n in _ATTENTION],
        "-": [f"mlp.{n}" for n in _DENSE],
        "E": ["pre_mlp_layernorm.weight", *(f"mlp.{n}" for n in moe)],
    }
    for index, block in enumerate(pattern):
        yield from (f"{root}layers.{index}.{name}" for name in names[block])


class MegatronHybrid:
    """The model; `weights` maps torch_dist keys to whole (unsharded) tensors, used as they are."""

    def __init__(self, settings: HybridSettings, weights: Mapping[str, Tensor]) -> None:
        wanted = checkpoint_keys(settings)
        # `x._extra_state/shard_0_1` are TransformerEngine's FP8 states, not parameters.
        stored = {key for key in weights if "_extra_state" not in key}
        problems = [f"missing {key}" for key in sorted(wanted - stored)]
        problems += [f"unexpected {key}" for key in sorted(stored - wanted)]
        if problems:
            raise ValueError("keys do not fit the settings:\n  " + "\n  ".join(problems))
        self.settings = settings
        self.weights = {key: weights[key] for key in wanted}
        rows = len(self.weights["embedding.word_embeddings.weight"])
        if rows < settings.vocab_size:
            raise ValueError(f"embedding has {rows} rows, vocab_size is {settings.vocab_size}")

    def forward(self, input_ids: Tensor) -> HybridOutput:
        """Run backbone and every MTP step on `input_ids` [B,S] (int64)."""
        s, w = self.settings, self.weights
        x_BSH = F.embedding(input_ids, w["embedding.word_embeddings.weight"])
        x_BSH = self._stack(x_BSH, s.pattern, root="decoder.")
        hidden = previous = self._norm(x_BSH, "decoder.final_norm.weight")
        ids, mtp = input_ids, []
        for step in range(s.mtp_num_layers):
            # Depth d at position t sees the embedding of token t+d; the end has none and gets id 0.
            ids = F.pad(ids[:, 1:], (0, 1))
            previous = self._mtp_step(ids, previous, layer=step % s.mtp_stored_layers)
            mtp.append(previous)
        logits = tuple(self._logits(h) for h in mtp)
        return HybridOutput(self._logits(hidden), hidden, tuple(mtp), logits)

    def _logits(self, hidden_BSH: Tensor) -> Tensor:
        """[B,S,V] without the rows that only pad the vocabulary."""
        tied = self.settings.tied_embeddings
        w_VH = self.weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]
        return F.linear(hidden_BSH, w_VH[: self.settings.vocab_size])

    def _mtp_step(self, ids_BS: Tensor, previous_BSH: Tensor, *, layer: int) -> Tensor:
        """One depth [B,S,H]: next embeddings fused with the previous hidden, block, norm."""
        root = f"mtp.layers.{layer}."
        embedded_BSH = F.embedding(ids_BS, self.weights["embedding.word_embeddings.weight"])
        halves = (
            self._norm(embedded_BSH, f"{root}enorm.weight"),
            self._norm(previous_BSH, f"{root}hnorm.weight"),
        )
        # Columns 0..H-1 of eh_proj [H,2H] multiply the embedding, H..2H-1 the hidden state.
        x_BSH = self._linear(torch.cat(halves, -1), f"{root}eh_proj.weight")
        x_BSH = self._stack(x_BSH, self.settings.mtp_pattern, root=f"{root}mtp_model_layer.")
        return self._norm(x_BSH, f"{root}final_layernorm.weight")

    def _stack(self, x_BSH: Tensor, pattern: str, *, root: str) -> Tensor:
        """Pre-norm residual blocks, without a final norm."""
        blocks = {"M": self._mamba, "*": self._attention, "-": self._dense, "E": self._moe}
        for index, block in enumerate(pattern):
            x_BSH = x_BSH + blocks[block](x_BSH, f"{root}layers.{index}.")
        return x_BSH

    def _norm(self, x: Tensor, key: str) -> Tensor:
        return _rms_norm(x, self.settings.layernorm_epsilon, self.weights[key])

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return F.linear(x, self.weights[key])

    def _attention(self, x_BSH: Tensor, root: str) -> Tensor:
        """Causal grouped-query attention, no positions; `linear_qkv` rows per group: q..q, k, v."""
        s, name = self.settings, f"{root}self_attention."
        per_group = s.num_attention_heads // s.num_query_groups
        normed_BSH = self._norm(x_BSH, f"{name}linear_qkv.layer_norm_weight")
        qkv = self._linear(normed_BSH, f"{name}linear_qkv.weight")
        qkv = torch.unflatten(qkv, -1, (s.num_query_groups, per_group + 2, s.kv_channels))
        q_BSGQC, k_BSGC, v_BSGC = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        scores = torch.einsum("bsgqc,btgc->bgqst", q_BSGQC.float(), k_BSGC.float())
        length = x_BSH.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x_BSH.device).triu(1)
        scores = (scores / math.sqrt(s.kv_channels)).masked_fill(future, -math.inf)
        mixed = torch.einsum("bgqst,btgc->bsgqc", scores.softmax(-1), v_BSGC.float())
        return self._linear(mixed.flatten(2).to(x_BSH.dtype), f"{name}linear_proj.weight")

    def _dense(self, x_BSH: Tensor, root: str) -> Tensor:
        name = f"{root}mlp."
        return self._squared_relu(self._norm(x_BSH, f"{name}linear_fc1.layer_norm_weight"), name)

    def _squared_relu(self, x: Tensor, name: str) -> Tensor:
        """Ungated MLP of `{name}linear_fc1.weight` [F,H] and `linear_fc2.weight` [H,F]."""
        inner = self._linear(x, f"{name}linear_fc1.weight").relu().square()
        return self._linear(inner, f"{name}linear_fc2.weight")

    def _moe(self, x_BSH: Tensor, root: str) -> Tensor:
        """Routed experts (in the latent space, if any) plus a shared expert on the full hidden."""
        name = f"{root}mlp."
        x_TH = self._norm(x_BSH, f"{root}pre_mlp_layernorm.weight").flatten(0, 1)
        weight_TK, expert_TK = self._route(x_TH, name)
        latent = self.settings.moe_latent_size
        x_TL = self._linear(x_TH, f"{name}fc1_latent_proj.weight") if latent else x_TH
        y_TL = self._experts(x_TL, name, weight_TK=weight_TK, expert_TK=expert_TK)
        y_TH = self._linear(y_TL, f"{name}fc2_latent_proj.weight") if latent else y_TL
        if self.settings.moe_shared_expert:
            y_TH = y_TH + self._squared_relu(x_TH, f"{name}shared_experts.")
        return y_TH.view_as(x_BSH)

    def _route(self, x_TH: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """(weights [T,K], experts [T,K]); `expert_bias` steers the choice and not the weights."""
        s = self.settings
        score_TE = F.linear(x_TH.float(), self.weights[f"{name}router.weight"].float()).sigmoid()
        choice_TE = score_TE + self.weights[f"{name}router.expert_bias"].float()
        if s.moe_router_num_groups and s.moe_router_group_topk:
            choice_TGe = torch.unflatten(choice_TE, 1, (s.moe_router_num_groups, -1))
            # megatron-core scores a group by its best topk/group_topk experts, transformers by two.
            best = s.moe_router_topk // s.moe_router_group_topk
            group_TG = choice_TGe.topk(best).values.sum(-1)
            kept = group_TG.topk(s.moe_router_group_topk).indices
            barred_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept, False)
            choice_TE = choice_TGe.masked_fill(barred_TG[..., None], -math.inf).flatten(1)
        expert_TK = choice_TE.topk(s.moe_router_topk).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if s.moe_router_topk > 1:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK * s.moe_router_topk_scaling_factor, expert_TK

    def _experts(self, x_TL: Tensor, name: str, *, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """[T,L]: every token through its K experts; an expert without tokens costs nothing."""
        w1_EFL = self.weights[f"{name}experts.experts.linear_fc1.weight"]
        w2_ELF = self.weights[f"{name}experts.experts.linear_fc2.weight"]
        y_TL = torch.zeros_like(x_TL)
        for expert in sorted(set(expert_TK.flatten().tolist())):
            token, slot = (expert_TK == expert).nonzero(as_tuple=True)
            inner = F.linear(x_TL[token], w1_EFL[expert]).relu().square()
            inner = (inner * weight_TK[token, slot, None]).to(x_TL.dtype)
            y_TL = y_TL.index_add(0, token, F.linear(inner, w2_ELF[expert]))
        return y_TL

    def _mamba(self, x_BSH: Tensor, root: str) -> Tensor:
        """Mamba2: projections, causal conv, scan, gated norm; N/U heads of a group share B, C."""
        s, name = self.settings, f"{root}mixer."
        x_BSH = self._norm(x_BSH, f"{name}in_proj.layer_norm_weight")
        z_BSI = self._linear(x_BSH, f"{name}in_proj.weight.z")
        x_BSI, b_BSc, c_BSc = (self._conv(x_BSH, name, part) for part in ("x", "B", "C"))
        x_BSNP = torch.unflatten(x_BSI, -1, (s.mamba_num_heads, s.mamba_head_dim))
        per_group = s.mamba_num_heads // s.mamba_num_groups
        b_BSNR, c_BSNR = (
            torch.unflatten(u, -1, (s.mamba_num_groups, -1)).repeat_interleave(per_group, 2) for u in (b_BSc, c_BSc)
        )
        dt_BSN = self._linear(x_BSH, f"{name}in_proj.weight.dt").float()
        dt_BSN = F.softplus(dt_BSN + self.weights[f"{name}dt_bias"].float())
        a_N = -self.weights[f"{name}A_log"].float().exp()
        y_BSNP = _scan(x_BSNP, dt_BSN, a_N, b_BSNR=b_BSNR, c_BSNR=c_BSNR)
        y_BSNP = y_BSNP + x_BSNP * self.weights[f"{name}D"].float()[:, None]
        w_I = self.weights[f"{name}norm.weight"]
        y_BSI = _gated_norm(y_BSNP.flatten(2), z_BSI, w_I, groups=s.mamba_num_groups)
        return self._linear(y_BSI.to(x_BSH.dtype), f"{name}out_proj.weight")

    def _conv(self, x_BSH: Tensor, name: str, part: str) -> Tensor:
        """Project to `x`, `B` or `C`, convolve causally per channel, silu (float32)."""
        w_c1W = self.weights[f"{name}conv1d.weight.{part}"].float()
        bias_c = self.weights[f"{name}conv1d.bias.{part}"].float()
        u_BcS = self._linear(x_BSH, f"{name}in_proj.weight.{part}").float().transpose(1, 2)
        u_BcS = F.pad(u_BcS, (w_c1W.shape[-1] - 1, 0))
        return F.silu(F.conv1d(u_BcS, w_c1W, bias_c, groups=len(bias_c))).transpose(1, 2)


def _rms_norm(x: Tensor, epsilon: float, weight: Tensor) -> Tensor:
    """Over the last axis, in float32, back in the dtype of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * weight.float()).to(x.dtype)


def _gated_norm(y_BSI: Tensor, z_BSI: Tensor, w_I: Tensor, *, groups: int) -> Tensor:
    """silu(z) first, then an RMSNorm over each of `groups` equal parts (norm_before_gate=False)."""
    gated_BSUi = torch.unflatten(y_BSI * F.silu(z_BSI.float()), -1, (groups, -1))
    return _rms_norm(gated_BSUi, _MAMBA_NORM_EPSILON, w_I.view(groups, -1)).flatten(2)


def _scan(x_BSNP: Tensor, dt_BSN: Tensor, a_N: Tensor, *, b_BSNR: Tensor, c_BSNR: Tensor) -> Tensor:
    """Mamba2's recurrence [B,S,N,P]: state = exp(dt*a) * state + outer(dt*x, b); y = state @ c."""
    decay_BSN = torch.exp(dt_BSN * a_N)
    inflow_BSNP = dt_BSN[..., None] * x_BSNP
    state_BNPR = x_BSNP.new_zeros(*inflow_BSNP[:, 0].shape, b_BSNR.shape[-1])
    steps = []
    for t in range(x_BSNP.shape[1]):
        inflow_BNPR = inflow_BSNP[:, t, :, :, None] * b_BSNR[:, t, :, None, :]
        state_BNPR = decay_BSN[:, t, :, None, None] * state_BNPR + inflow_BNPR
        steps.append((state_BNPR * c_BSNR[:, t, :, None, :]).sum(-1))
    return torch.stack(steps, 1)
