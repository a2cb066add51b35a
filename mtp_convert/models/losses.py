"""Losses per token, their configs, and the one call that serves both kinds: from logits, from hidden states.

Labels are those of the next token already (label t is token t + 1). Symbols: T tokens, V vocabulary, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy, LinearCrossEntropy
from mtp_convert.models.token_losses import IGNORED_LABEL, REDUCTIONS, chunked_losses, reduce_losses


class _LogitsCrossEntropy(nn.Module, ABC):
    """What the losses from logits have in common; a subclass computes the loss of every token."""

    def __init__(self, ignore_index: int, reduction: str) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")
        self.ignore_index = ignore_index
        self.reduction = reduction

    @abstractmethod
    def token_losses(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """[T], 0 where the target is `ignore_index`."""

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar ([..] for "none"); no argument is changed.

        Args:
            logits: [.., V].
            labels: token ids or `ignore_index`, [..].
            mask: [..], 0 or False for tokens that count for nothing.
            num_label_tokens: divides the sum; 0 gives 0.
            loss_weights: [..], a factor per token.

        Raises:
            ValueError: shapes do not fit, or an argument does not go with the reduction.
        """
        if logits.shape[:-1] != labels.shape or (mask is not None and mask.shape != labels.shape):
            masked = "" if mask is None else f", mask {tuple(mask.shape)}"
            raise ValueError(
                f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}{masked} do not fit, "
                "expected logits.shape[:-1] == labels.shape and mask.shape == labels.shape"
            )
        labels = labels.to(logits.device, torch.long)
        if mask is not None:
            labels = labels.masked_fill(mask.to(labels.device) == 0, self.ignore_index)
        targets_T = labels.reshape(-1)
        losses_T = self.token_losses(logits.reshape(-1, logits.shape[-1]), targets_T)
        return reduce_losses(
            losses_T.view(labels.shape),
            counted=targets_T != self.ignore_index,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens,
            loss_weights=loss_weights,
        )


class MaskedCrossEntropy(_LogitsCrossEntropy):
    """Cross entropy of logits [.., V] against labels [..].

    Args:
        fp32_upcast: compute in float32 what comes in less.
        ignore_index: label that counts for nothing.
        reduction: "sum", "mean" (0 if no label counts) or "none".
    """

    def __init__(self, fp32_upcast: bool = True, ignore_index: int = IGNORED_LABEL, reduction: str = "sum") -> None:
        super().__init__(ignore_index, reduction)
        self.fp32_upcast = fp32_upcast

    def token_losses(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """[T], 0 where the target is `ignore_index`."""
        if self.fp32_upcast:
            logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return F.cross_entropy(logits_TV, targets_T, ignore_index=self.ignore_index, reduction="none")


class ChunkedCrossEntropy(_LogitsCrossEntropy):
    """`MaskedCrossEntropy` in float32 that widens `chunk_len` rows of logits at a time, and keeps none of them.

    Args:
        chunk_len: rows at a time, 1 or more.
        ignore_index: label that counts for nothing.
        reduction: "sum", "mean" (0 if no label counts) or "none".
    """

    def __init__(self, chunk_len: int = 32, ignore_index: int = IGNORED_LABEL, reduction: str = "sum") -> None:
        super().__init__(ignore_index, reduction)
        if chunk_len < 1:
            raise ValueError(f"chunk_len is {chunk_len}, expected 1 or more")
        self.chunk_len = chunk_len

    def token_losses(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        """[T], 0 where the target is `ignore_index`."""
        return chunked_losses(logits_TV, targets_T, ignore_index=self.ignore_index, chunk_len=self.chunk_len)


class LossConfig(Protocol):
    """Settings that know the loss they belong to."""

    def build(self) -> nn.Module:
        """The loss."""


@dataclass(frozen=True)
class MaskedCrossEntropyConfig:
    """Settings of `MaskedCrossEntropy`."""

    fp32_upcast: bool = True
    ignore_index: int = IGNORED_LABEL
    reduction: str = "sum"

    def build(self) -> MaskedCrossEntropy:
        """The loss."""
        return MaskedCrossEntropy(self.fp32_upcast, self.ignore_index, self.reduction)


@dataclass(frozen=True)
class ChunkedCEConfig:
    """Settings of `ChunkedCrossEntropy`."""

    chunk_len: int = 32
    ignore_index: int = IGNORED_LABEL
    reduction: str = "sum"

    def build(self) -> ChunkedCrossEntropy:
        """The loss."""
        return ChunkedCrossEntropy(self.chunk_len, self.ignore_index, self.reduction)


@dataclass(frozen=True)
class FusedLinearCEConfig:
    """Settings of `FusedLinearCrossEntropy`."""

    ignore_index: int = IGNORED_LABEL
    logit_softcapping: float = 0.0
    reduction: str = "sum"
    chunk_len: int | None = None

    def build(self) -> FusedLinearCrossEntropy:
        """The loss."""
        return FusedLinearCrossEntropy(
            self.ignore_index, self.logit_softcapping, self.reduction, chunk_len=self.chunk_len
        )


LOSS_CONFIG_REGISTRY: dict[str, Callable[..., LossConfig]] = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig,
    "ChunkedCrossEntropy": ChunkedCEConfig,
    "FusedLinearCrossEntropy": FusedLinearCEConfig,
}


def build_loss_module(loss: LossConfig | str | Callable[..., nn.Module], **settings: object) -> nn.Module:
    """The loss that a config, a name of the registry, or a class or function describes.

    `settings` are the fields of the named config or the arguments of the callable.

    Raises:
        TypeError: `loss` is a config's class, an unknown name, or none of these.
        ValueError: `settings` beside a finished config.
    """
    if isinstance(loss, str):
        if loss not in LOSS_CONFIG_REGISTRY:
            raise TypeError(f"Unknown loss name {loss!r}, expected one of {sorted(LOSS_CONFIG_REGISTRY)}")
        return LOSS_CONFIG_REGISTRY[loss](**settings).build()
    if isinstance(loss, type) and hasattr(loss, "build"):
        raise TypeError(f"expected a config instance, not the class {loss.__name__}; write {loss.__name__}()")
    if hasattr(loss, "build"):
        if settings:
            raise ValueError(f"{', '.join(sorted(settings))} must be set on the config")
        return loss.build()
    if not callable(loss):
        raise TypeError(f"expected a config, a name or a class/callable, got {type(loss).__name__}")
    return loss(**settings)


def loss_ignore_index(loss_fn: object) -> int:
    """The label that `loss_fn` leaves out: its `ignore_index`, -100 if it names none."""
    value = getattr(loss_fn, "ignore_index", IGNORED_LABEL)
    return int(value) if isinstance(value, Integral) else IGNORED_LABEL


def get_lm_head(model: nn.Module) -> nn.Module | None:
    """`model.get_output_embeddings()`, or else the first submodule named `lm_head` that has a weight; None for none."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is not None:
        return head
    named = (module for name, module in model.named_modules() if name.split(".")[-1] == "lm_head")
    return next((module for module in named if hasattr(module, "weight")), None)


def get_lm_head_weight(model: nn.Module) -> Tensor:
    """The LM head's weight [V, H] as the model holds it.

    Raises:
        ValueError: the model has no LM head.
    """
    head = get_lm_head(model)
    if head is None:
        raise ValueError("lm_head.weight not found in model")
    weight: Tensor = head.weight  # type: ignore[assignment]
    return weight


def calculate_loss(
    loss_fn: nn.Module,
    *,
    labels: Tensor,
    logits: Tensor | None = None,
    hidden_states: Tensor | None = None,
    model: nn.Module | None = None,
    lm_weight: Tensor | None = None,
    num_label_tokens: int | None = None,
    grad_reduce_group: dist.ProcessGroup | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Call `loss_fn` with what its kind needs; labels of -100 become its own `ignore_index`.

    Args:
        loss_fn: a `LinearCrossEntropy`, which gets hidden states and the LM head's weight, or any other loss, which
            gets logits.
        labels: [..].
        logits: [.., V].
        hidden_states: [.., H], after the final norm.
        model: owner of the LM head, if there is no `lm_weight`.
        lm_weight: [V, H], materialised.
        num_label_tokens: passed on.
        grad_reduce_group: passed on to a `LinearCrossEntropy`.
        loss_weights: passed on if given, [..].

    Raises:
        ValueError: what the loss needs is missing.
    """
    ignore_index = loss_ignore_index(loss_fn)
    if ignore_index != IGNORED_LABEL:
        labels = labels.masked_fill(labels == IGNORED_LABEL, ignore_index)
    inputs: dict[str, Any] = {"labels": labels, "num_label_tokens": num_label_tokens}
    if loss_weights is not None:
        inputs["loss_weights"] = loss_weights
    name = type(loss_fn).__name__
    if isinstance(loss_fn, LinearCrossEntropy):
        if hidden_states is None:
            raise ValueError(f"{name} needs hidden_states")
        if lm_weight is None:
            if model is None:
                raise ValueError(f"{name} needs lm_weight, or the model that holds it")
            lm_weight = get_lm_head_weight(model)
        inputs |= {"hidden_states": hidden_states, "lm_weight": lm_weight, "grad_reduce_group": grad_reduce_group}
    else:
        if logits is None:
            raise ValueError(f"{name} needs logits")
        inputs["logits"] = logits
    loss: Tensor = loss_fn(**inputs)
    return loss
