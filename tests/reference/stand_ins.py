"""Pure-torch `transformer_engine` and `mamba_ssm`, as far as a HybridModel uses them.

Both packages need a GPU. megatron-core's own wrapper classes run on top of these: only names, shapes, the presence of
`_extra_state` and the arithmetic are modelled. Which modules own an `_extra_state` follows TransformerEngine 2.
The forward pass is for one process: no collectives.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron_cpu import empty_module
from torch import Tensor, nn


class Stateful(nn.Module):
    """Holds the `_extra_state` that TransformerEngine keeps for fp8: present, and empty without fp8."""

    fp8 = fp8_calibration = False
    fp8_meta: ClassVar = {"fp8_checkpoint": False}

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        pass

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1, *, plus: float = 0.0) -> Tensor:
    """Every group of the last axis by its root mean square, in float32; `plus` is 1 for weights that count from 0."""
    parts = x.float().unflatten(-1, (groups, -1))
    scaled = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (scaled.flatten(-2) * (weight.float() + plus)).to(x.dtype)


class RMSNorm(Stateful):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        params_dtype: torch.dtype,
        zero_centered_gamma: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        self.eps, self.plus = eps, float(zero_centered_gamma)
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, plus=self.plus)


class LayerNorm(Stateful):
    """`transformer_engine.pytorch.LayerNorm`."""

    def __init__(self, normalized_shape: int, eps: float, params_dtype: torch.dtype, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def local_sizes(in_features: int, out_features: int, parallel_mode: str | None, tp_size: int) -> tuple[int, int]:
    """The (out, in) shape of one rank's weight."""
    if parallel_mode == "column":
        return out_features // tp_size, in_features
    return out_features, in_features // (tp_size if parallel_mode == "row" else 1)


class Linear(Stateful):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        bias: bool,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        init_method: Callable[[Tensor], object] | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        shape = local_sizes(in_features, out_features, parallel_mode, tp_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=params_dtype)) if bias else None
        if init_method is not None:
            init_method(self.weight.data)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    """`transformer_engine.pytorch.LayerNormLinear` with an RMS norm."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        params_dtype: torch.dtype,
        bias: bool,
        tp_size: int,
        parallel_mode: str,
        zero_centered_gamma: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            params_dtype=params_dtype,
            bias=bias,
            parallel_mode=parallel_mode,
            tp_size=tp_size,
        )
        self.eps, self.plus = eps, float(zero_centered_gamma)
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps, plus=self.plus))


class GroupedLinear(Stateful):
    """`transformer_engine.pytorch.GroupedLinear`: one weight per expert, rows given expert by expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        **_: object,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, False
        shape = local_sizes(in_features, out_features, parallel_mode, tp_size)
        for expert in range(num_gemms):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.zeros(shape, dtype=params_dtype)))

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        rows = x.split([int(n) for n in m_splits])
        return torch.cat([F.linear(part, getattr(self, f"weight{e}")) for e, part in enumerate(rows)])


class DotProductAttention(Stateful):
    """`transformer_engine.pytorch.DotProductAttention`: causal, layout sequence, batch, head, channel."""

    def __init__(
        self,
        *_: object,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        **__: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.before = -1 if window_size is None else window_size[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        repeat = query.shape[2] // key.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3).float() for t in (query, key, value))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ k.mT * (self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1]))
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if self.before >= 0:
            later |= torch.ones_like(later).tril(-self.before - 1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return mixed.permute(2, 0, 1, 3).flatten(2).to(query.dtype)


class GatedRMSNorm(nn.Module):
    """`mamba_ssm`'s grouped norm; the gate is applied before it, by the scan."""

    def __init__(
        self, hidden_size: int, *, eps: float, group_size: int, dtype: torch.dtype | None = None, **_: object
    ) -> None:
        super().__init__()
        self.eps, self.groups = eps, hidden_size // group_size
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert z is None, "megatron-core's training path gates in the scan"
        return rms_norm(x, self.weight, self.eps, self.groups)


def mamba_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    headdim: int,
    ngroups: int,
    **_: object,
) -> Tensor:
    """The Mamba-2 recurrence position by position: convolution, scan, skip, gate."""
    heads, length = A.shape[0], zxbcdt.shape[1]
    inner = heads * headdim
    channels, width = conv1d_weight.shape
    state_size = (channels - inner) // (2 * ngroups)
    z, xbc, dt = zxbcdt.float().split([inner, channels, heads], -1)
    weight, bias = conv1d_weight.float().unsqueeze(1), conv1d_bias.float()
    xbc = F.silu(F.conv1d(F.pad(xbc.mT, (width - 1, 0)), weight, bias, groups=channels).mT)
    x, b, c = xbc.split([inner, ngroups * state_size, ngroups * state_size], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (t.unflatten(-1, (ngroups, state_size)).repeat_interleave(heads // ngroups, 2) for t in (b, c))
    dt = F.softplus(dt + dt_bias)
    state, out = torch.zeros(x.shape[0], heads, headdim, state_size), []
    for t in range(length):
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + update
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    y = torch.stack(out, 1) + x * D.float()[:, None]
    return (y.flatten(2) * F.silu(z)).to(zxbcdt.dtype)


def _empty_class(name: str) -> type:
    """Base classes and isinstance targets of features that stay off."""
    return type(name, (), {})


def install() -> None:
    """Both packages into `sys.modules`."""
    empty_module("transformer_engine").__version__ = "2.2.0"
    engine = empty_module("transformer_engine.pytorch")
    for kind in (Linear, LayerNormLinear, LayerNorm, RMSNorm, GroupedLinear, DotProductAttention):
        setattr(engine, kind.__name__, kind)
    engine.fp8_model_init = lambda *_, **__: contextlib.nullcontext()
    fp8 = empty_module("transformer_engine.pytorch.fp8")
    fp8.FP8GlobalStateManager = type("FP8GlobalStateManager", (), {"is_fp8_enabled": staticmethod(lambda: False)})
    fp8.fp8_autocast = fp8.fp8_model_init = engine.fp8_model_init
    empty_module("transformer_engine.pytorch.distributed", _empty_class)
    for name in ("ops", "tensor"):
        empty_module(f"transformer_engine.pytorch.{name}", _empty_class)
    empty_module("transformer_engine.common")
    empty_module("transformer_engine.common.recipe", _empty_class)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        empty_module(name)
    empty_module("mamba_ssm.ops.triton.layernorm_gated").RMSNorm = GatedRMSNorm
    scan = empty_module("mamba_ssm.ops.triton.ssd_combined")
    scan.mamba_split_conv1d_scan_combined = mamba_scan
    scan.mamba_chunk_scan_combined = lambda *_, **__: None
