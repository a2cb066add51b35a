"""RMSNorm and LayerNorm, computed in float32 at least, whatever the dtype of their input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ProcessGroupCollection
from mtp_convert.models.megatron.module import EmptyState, MegatronModule


def widen(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rms(x: Tensor, epsilon: float) -> Tensor:
    """`x` [..., H] with a root mean square of one along its last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """Normalise the last axis as the model does; the result has the dtype of `x`."""
    wide, gain = widen(x), widen(weight)
    if config.layernorm_zero_centered_gamma:
        gain = gain + 1
    if config.normalization == "RMSNorm":
        normed = unit_rms(wide, config.layernorm_epsilon) * gain
    else:
        shift = None if bias is None else widen(bias)
        normed = F.layer_norm(wide, (x.shape[-1],), gain, shift, config.layernorm_epsilon)
    return normed.to(x.dtype)


def norm_parameters(size: int, config: TransformerConfig) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias [size] of a norm that changes nothing yet; only LayerNorm has a bias."""
    gain = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    weight = nn.Parameter(torch.full((size,), gain, dtype=config.params_dtype))
    if config.normalization == "RMSNorm":
        return weight, None
    return weight, nn.Parameter(torch.zeros(size, dtype=config.params_dtype))


class Norm(MegatronModule):
    """The model's norm over `hidden_size` values."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config, pg_collection)
        self.weight, self.bias = norm_parameters(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden_size] normalised."""
        return normalize(x, self.weight, self.bias, self.config)


class TENorm(EmptyState, Norm):
    """A Norm as TransformerEngine stores it."""
