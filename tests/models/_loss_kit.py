"""Losses, inputs and an LM head that several test files share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy, LinearCrossEntropy
from mtp_convert.models.losses import ChunkedCrossEntropy, MaskedCrossEntropy
from mtp_convert.models.mtp import MTPConfig

T, V, H = 17, 23, 7
IGNORED = -5
Loss = MaskedCrossEntropy | ChunkedCrossEntropy | FusedLinearCrossEntropy
MAKERS: dict[str, Callable[[str], Loss]] = {
    "masked": lambda reduction: MaskedCrossEntropy(ignore_index=IGNORED, reduction=reduction),
    "chunked": lambda reduction: ChunkedCrossEntropy(4, IGNORED, reduction),
    "fused": lambda reduction: FusedLinearCrossEntropy(IGNORED, reduction=reduction, chunk_len=4),
}
every_loss = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
# with the ignored label of datasets, a sum, and chunks that do not divide the tokens
plain_losses = pytest.mark.parametrize(
    "loss",
    [MaskedCrossEntropy(), ChunkedCrossEntropy(5), FusedLinearCrossEntropy(chunk_len=7)],
    ids=["masked", "chunked", "fused"],
)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], head [V, H], labels [T] of which some are ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[[0, 5, 16]] = IGNORED
    return hidden, weight, labels


def run(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
    result: Tensor
    if isinstance(loss, LinearCrossEntropy):
        result = loss(hidden, labels, weight, **kwargs)
    else:
        result = loss(hidden @ weight.T, labels, **kwargs)
    return result


class Model(nn.Module):
    """An LM head and what else the loss asks a model for."""

    def __init__(self, weight: Tensor, mtp_config: MTPConfig | None = None) -> None:
        super().__init__()
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lm_head.weight = nn.Parameter(weight.detach().clone())
        self.mtp_config = mtp_config
