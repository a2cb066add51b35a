"""Distances of two tensors of one place, and of two sets of logits. Symbols: B rows, S positions, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_convert.verify.result import LogitScores

TOP = 5


class Distance(NamedTuple):
    """How far `b` is from `a`; `relative` is the largest difference over the largest value of `a`."""

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float


def distance(a: Tensor, b: Tensor) -> Distance:
    """Distances of two tensors of one shape, in float64; ValueError if the shapes differ.

    Values that are not finite on one side alone are infinitely far.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)}")
    x, y = a.detach().double().flatten(), b.detach().double().flatten()
    both = torch.isfinite(x) & torch.isfinite(y)
    alike = both | (x == y) | (x.isnan() & y.isnan())
    if not bool(alike.all()):
        return Distance(float("inf"), float("inf"), float("inf"), 0.0)
    x, y = x[both], y[both]
    if not x.numel():
        return Distance(0.0, 0.0, 0.0, 1.0)
    gap = (x - y).abs()
    most, scale = float(gap.max()), float(x.abs().max())
    relative = most / scale if scale else (0.0 if most == 0 else float("inf"))
    return Distance(most, float(gap.mean()), relative, _cosine(x, y))


def _cosine(x: Tensor, y: Tensor) -> float:
    size = float(x.norm() * y.norm())
    if size == 0.0:
        return 1.0 if bool((x == y).all()) else 0.0
    return min(1.0, max(-1.0, float(x @ y) / size))


def scores(place: str, a: Tensor, b: Tensor, ids: Tensor, mains: tuple[Tensor, Tensor] | None = None) -> LogitScores:
    """Agreement of logits [B, S, V] computed for `ids` [B, S].

    Without `mains` these are the main logits: position i predicts token i + 1. With the main logits of both sides they
    are those of the MTP step that `place` names: position i of step k predicts token i + k + 2, as does the main model
    at position i + k + 1.
    """
    step = -1 if mains is None else int(place.split(".")[1])
    ahead = step + 2
    accepted = None
    if mains is not None:
        accepted = acceptance(a, mains[0], step), acceptance(b, mains[1], step)
    return LogitScores(
        place, kl(a, b), agreement(a, b, 1), agreement(a, b, TOP), (loss(a, ids, ahead), loss(b, ids, ahead)), accepted
    )


def kl(a: Tensor, b: Tensor) -> float:
    """Mean KL divergence of `b` from `a` over all tokens, in nats."""
    p, q = (F.log_softmax(x.double(), dim=-1) for x in (a, b))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def agreement(a: Tensor, b: Tensor, top: int) -> float:
    """The share of `a`'s `top` choices per token that are among `b`'s, as a mean over tokens."""
    top = min(top, a.shape[-1])
    first, second = (x.topk(top, dim=-1).indices for x in (a, b))
    return float((first.unsqueeze(-1) == second.unsqueeze(-2)).any(-1).double().mean())


def loss(logits: Tensor, ids: Tensor, ahead: int) -> float:
    """Mean cross-entropy, in nats, of the tokens `ahead` positions on; NaN where the rows are too short."""
    if ids.shape[1] <= ahead:
        return float("nan")
    predicted, wanted = logits[:, :-ahead].double(), ids[:, ahead:]
    return float(F.cross_entropy(predicted.flatten(0, 1), wanted.flatten()))


def acceptance(drafts: Tensor, main: Tensor, step: int) -> float:
    """The share of positions at which the draft of MTP step `step` is the main model's own choice for that token."""
    ahead = step + 1
    if drafts.shape[1] <= ahead:
        return float("nan")
    return float((drafts.argmax(-1)[:, :-ahead] == main.argmax(-1)[:, ahead:]).double().mean())
