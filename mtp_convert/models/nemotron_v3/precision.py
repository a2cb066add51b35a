"""Parameters that stay in float32 beside narrower weights, as releases store them."""

from collections.abc import Callable
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from mtp_convert.models.precision import sparing

# Mamba's scalars set decay rates and the router bias decides near ties: bfloat16's 8 bits change both.
FLOAT32_LEAVES = frozenset({"A_log", "D", "dt_bias", "e_score_correction_bias"})


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that the parameter or buffer `name` has in a model of type `dtype`."""
    kept = name.rsplit(".", 1)[-1] in FLOAT32_LEAVES and dtype.itemsize < torch.float32.itemsize
    return torch.float32 if kept else dtype


class KeepsFloat32(nn.Module):
    """A module whose own `FLOAT32_LEAVES` no cast of it, or of a model around it, makes narrower."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = chain(self._parameters.items(), self._buffers.items())
        kept = [tensor for name, tensor in own if tensor is not None and name in FLOAT32_LEAVES]
        applied: Self = super()._apply(sparing(fn, kept), recurse)  # type: ignore[no-untyped-call]
        return applied
