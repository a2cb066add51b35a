"""Which parameters stay in float32 beside narrower weights, and how they are kept so."""

from collections.abc import Callable
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_convert.models.deepseek_v4.config import BackendConfig
from mtp_convert.models.precision import sparing

# What transformers keeps (hyper-connections, sinks, position and router biases, norms), MTP's own parameters of the
# same kinds, and the rotary frequencies.
_HYPER_CONNECTIONS = {"attn_hc", "ffn_hc", "hc_head"}
_BIASES = {"sinks", "position_bias", "e_score_correction_bias"}
_NORMS = {"q_a_norm", "kv_norm", "input_layernorm", "post_attention_layernorm", "norm", "enorm", "hnorm"}
_FREQUENCIES = {f"{kind}_{which}" for kind in ("main", "compress") for which in ("inv_freq", "original_inv_freq")}
_FLOAT32_PARTS = _HYPER_CONNECTIONS | _BIASES | _NORMS | _FREQUENCIES


def stays_float32(name: str, backend: BackendConfig) -> bool:
    """Whether the parameter or buffer of this native name is kept in float32 whatever the model's dtype."""
    parts = name.split(".")
    if backend.float32_head and parts[0] == "lm_head":
        return True
    if backend.float32_compressor and "compressor" in parts and parts[-2] in ("kv_proj", "gate_proj"):
        return True
    return not _FLOAT32_PARTS.isdisjoint(parts)


def cast_weights(module: nn.Module, dtype: torch.dtype, backend: BackendConfig) -> None:
    """Cast a module tree in place, but for what stays in float32."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not stays_float32(name, backend):
            tensor.data = tensor.data.to(dtype)


class Float32Linear(nn.Linear):
    """A projection that multiplies in float32 whatever it is given."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] float32."""
        return F.linear(input.float(), self.weight.float())


class KeepsFloat32(nn.Module):
    """A model that `.to(dtype)`, `.bfloat16()` and the like move as a whole, but make narrower only where allowed."""

    backend: BackendConfig

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        named = chain(self.named_parameters(), self.named_buffers())
        kept = [tensor for name, tensor in named if stays_float32(name, self.backend)]
        applied: Self = super()._apply(sparing(fn, kept), recurse)  # type: ignore[no-untyped-call]
        return applied
