"""Cross entropy per token, a few rows of float32 logits at a time, and what becomes of the T values.

Symbols: T tokens, C tokens of one chunk, H hidden size, V vocabulary. Both functions give the loss of every token, [T]
in float32 (float64 for float64 inputs), 0 where the target is `ignore_index`; any reduction follows in plain autograd.
Logits are computed again in the backward pass, so between the passes only the inputs and one number per token are
kept. `create_graph` is refused: second derivatives would lack these losses' part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean", "none")
IGNORED_LABEL = -100  # how datasets mark what is no target, whatever a loss calls it


@dataclass(frozen=True)
class _Settings:
    ignore_index: int
    chunk_len: int
    softcap: float = 0.0


class _Context(Protocol):
    """What autograd hands to both passes."""

    settings: _Settings
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def chunked_losses(logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int, chunk_len: int) -> Tensor:
    """Loss per token of `logits_TV`; only `chunk_len` rows at a time are widened to float32."""
    settings = _Settings(ignore_index, chunk_len)
    losses_T: Tensor = _FromLogits.apply(logits_TV, targets_T, settings)  # type: ignore[no-untyped-call]
    return losses_T


def linear_losses(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, ignore_index: int, chunk_len: int, softcap: float = 0.0
) -> Tensor:
    """Loss per token of the logits `hidden_TH @ weight_VH.T`, of which only [chunk_len, V] exist at a time.

    Different dtypes meet in the wider one, as a float32 head wants it. Under autocast both are cast first.
    `softcap` c > 0 replaces a logit z by c * tanh(z / c).
    """
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_TH, weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
    settings = _Settings(ignore_index, chunk_len, softcap)
    with torch.autocast(device, enabled=False):  # both passes must see the same logits
        losses_T: Tensor = _FromHidden.apply(hidden_TH, weight_VH, targets_T, settings)  # type: ignore[no-untyped-call]
    return losses_T


def reduce_losses(
    losses: Tensor,
    *,
    counted: Tensor,
    reduction: str,
    num_label_tokens: int | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Bring the losses of all tokens together.

    Args:
        losses: [..], 0 where nothing counts.
        counted: bool [..], the tokens that count.
        reduction: "sum", "mean" over what counts (0 if nothing does, so that an empty microbatch cannot turn a run
            into NaN), or "none" for [..].
        num_label_tokens: divides the sum: all tokens that count in the whole step, other microbatches and ranks
            included. 0 gives a loss of 0 and zero gradients.
        loss_weights: [..], a factor per token.

    Raises:
        ValueError: `num_label_tokens` or `loss_weights` with another reduction than "sum", or of another shape.
    """
    if reduction != "sum" and (num_label_tokens is not None or loss_weights is not None):
        raise ValueError(
            f"num_label_tokens and loss_weights are only supported with reduction 'sum', got {reduction!r}"
        )
    if reduction == "none":
        return losses
    if loss_weights is not None:
        if loss_weights.shape != losses.shape:
            raise ValueError(f"loss_weights has shape {tuple(loss_weights.shape)}, expected {tuple(losses.shape)}")
        losses = losses * loss_weights.to(losses)
    total = losses.sum()
    if reduction == "mean":
        return total / counted.sum().clamp(min=1)
    if num_label_tokens is None:
        return total
    return total * 0.0 if num_label_tokens == 0 else total / num_label_tokens


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits_TV: Tensor, targets_T: Tensor, settings: _Settings) -> Tensor:
        wide = _wide(logits_TV.dtype)
        losses_T, lse_T = _buffers(targets_T, wide)
        for rows in _chunks(len(targets_T), settings.chunk_len):
            losses_T[rows], lse_T[rows] = _losses(logits_TV[rows].to(wide), targets_T[rows], settings)
        ctx.save_for_backward(logits_TV, targets_T, lse_T)
        ctx.settings = settings
        return losses_T

    @staticmethod
    def backward(ctx: _Context, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        logits_TV, targets_T, lse_T = ctx.saved_tensors
        grad_logits_TV = torch.empty_like(logits_TV)
        for rows in _chunks(len(targets_T), ctx.settings.chunk_len):
            z_CV = logits_TV[rows].to(lse_T.dtype)
            grad_logits_TV[rows] = _grad_logits(z_CV, lse_T[rows], targets_T[rows], grad_T[rows], ctx.settings)
        return grad_logits_TV, None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, settings: _Settings) -> Tensor:
        losses_T, lse_T = _buffers(targets_T, _wide(_common(hidden_TH, weight_VH)))
        for rows in _chunks(len(targets_T), settings.chunk_len):
            z_CV = _logits(hidden_TH[rows], weight_VH, settings)
            losses_T[rows], lse_T[rows] = _losses(z_CV, targets_T[rows], settings)
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, lse_T)
        ctx.settings = settings
        return losses_T

    @staticmethod
    def backward(ctx: _Context, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        hidden_TH, weight_VH, targets_T, lse_T = ctx.saved_tensors
        settings, common = ctx.settings, _common(hidden_TH, weight_VH)
        grad_hidden_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        # One sum over all chunks: in bfloat16 late chunks would be rounded away.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=lse_T.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(targets_T), settings.chunk_len):
            z_CV = _logits(hidden_TH[rows], weight_VH, settings)
            grad_CV = _grad_logits(z_CV, lse_T[rows], targets_T[rows], grad_T[rows], settings)
            if settings.softcap:
                grad_CV *= 1 - (z_CV / settings.softcap) ** 2  # derivative of the cap
            grad_CV = grad_CV.to(common)
            if grad_hidden_TH is not None:
                grad_hidden_TH[rows] = (grad_CV @ weight_VH.to(common)).to(hidden_TH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH += grad_CV.T @ hidden_TH[rows].to(common)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight, None, None


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():  # in a backward pass only under create_graph
        raise RuntimeError("chunked cross entropy has no second derivative; call backward without create_graph")


def _chunks(tokens: int, chunk_len: int) -> Iterator[slice]:
    return (slice(start, start + chunk_len) for start in range(0, tokens, chunk_len))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _common(hidden_TH: Tensor, weight_VH: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_TH.dtype, weight_VH.dtype)


def _buffers(targets_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(targets_T, dtype=dtype), torch.empty_like(targets_T, dtype=dtype)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, settings: _Settings) -> Tensor:
    """[C, V], widened."""
    common = _common(hidden_CH, weight_VH)
    z_CV = (hidden_CH.to(common) @ weight_VH.to(common).T).to(_wide(common))
    return (z_CV / settings.softcap).tanh() * settings.softcap if settings.softcap else z_CV


def _losses(z_CV: Tensor, targets_C: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Loss and log of the sum of exponentials per token, both [C]."""
    counted_C = targets_C != settings.ignore_index
    lse_C = z_CV.logsumexp(-1)
    chosen_C = z_CV.gather(-1, targets_C.where(counted_C, 0).unsqueeze(-1)).squeeze(-1)
    return (lse_C - chosen_C).where(counted_C, 0.0), lse_C


def _grad_logits(z_CV: Tensor, lse_C: Tensor, targets_C: Tensor, grad_C: Tensor, settings: _Settings) -> Tensor:
    """Gradient of the (capped) logits, [C, V]: probabilities, less 1 at the target, times the token's gradient."""
    counted_C = targets_C != settings.ignore_index
    p_CV = (z_CV - lse_C.unsqueeze(-1)).exp_()
    minus_one_C1 = p_CV.new_full((len(targets_C), 1), -1.0)
    p_CV.scatter_add_(-1, targets_C.where(counted_C, 0).unsqueeze(-1), minus_one_C1)
    # where, not a product: the row of an ignored token may hold infinities
    return p_CV.mul_(grad_C.unsqueeze(-1)).masked_fill_(~counted_C.unsqueeze(-1), 0.0)
