"""The tensors of a safetensors folder, found by header and decoded one at a time.

Releases store most matrices [o, i] quantised, with a tensor of scales beside each: FP8 (e4m3, one scale for each
block of 128 x 128), and for routed experts FP4 (e2m1, two columns in a byte, one scale for 32 columns of a row).
"""

import torch
from torch import Tensor

from mtp_convert.models.safetensors_folder import SafetensorsFolder

_BLOCK = 128  # rows and columns that share an FP8 scale
_GROUP = 32  # columns that share an FP4 scale
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; 8 more is negative
_QUANTISED = frozenset({"F8_E4M3", "I8"})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I64", "I32", "I16"})


class StoredTensors(SafetensorsFolder):
    """The same, but `read` also decodes what is quantised."""

    def scale_of(self, name: str) -> str | None:
        """The tensor with the scales of this one, if it is quantised."""
        if self.dtype(name) not in _QUANTISED or not name.endswith(".weight"):
            return None
        names = (name.removesuffix("weight") + "scale", name + "_scale_inv")
        return next((n for n in names if n in self), None)

    def problem(self, name: str, like: Tensor) -> str | None:
        """Why this tensor cannot be decoded into one like `like`, or None."""
        dtype, shape = self.dtype(name), self.shape(name)
        if dtype in _QUANTISED and like.is_floating_point() and like.dim() == 2:
            return self._quantised_problem(name, *like.shape)
        if dtype not in (_FLOATS if like.is_floating_point() else _INTEGERS):
            return f"{name} is {dtype}, expected {'floating point' if like.is_floating_point() else 'integers'}"
        if shape != tuple(like.shape):
            return f"{name} has shape {shape}, expected {tuple(like.shape)}"
        return None

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to float32 if need be."""
        scale = self.scale_of(name)
        if scale is None:
            return self[name]
        return (_from_fp4 if self.dtype(name) == "I8" else _from_fp8)(self[name], self[scale])

    def _quantised_problem(self, name: str, rows: int, columns: int) -> str | None:
        dtype = self.dtype(name)
        fp4 = dtype == "I8"
        shape = (rows, columns // 2) if fp4 else (rows, columns)
        scales = (rows, columns // _GROUP) if fp4 else (-(-rows // _BLOCK), -(-columns // _BLOCK))
        scale = self.scale_of(name)
        if scale is None:
            return f"{name} is {dtype} but has no scales beside it"
        if self.shape(name) != shape:
            return f"{name} has shape {self.shape(name)}, expected {shape}"
        if self.shape(scale) != scales:
            return f"{scale} has shape {self.shape(scale)}, expected {scales}"
        return None


def _from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [o, i] and scales [ceil(o / 128), ceil(i / 128)] -> float32 [o, i]."""
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(_BLOCK, 0)[:rows].repeat_interleave(_BLOCK, 1)[:, :columns]
    return weight.float() * spread


def _from_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Bytes [o, i / 2], the even column in the low half, and scales [o, i / 32] -> float32 [o, i]."""
    table = torch.tensor([*_FP4_VALUES, *(-v for v in _FP4_VALUES)])
    bits = packed.view(torch.uint8)
    codes = torch.stack((bits & 15, bits >> 4), dim=-1).flatten(-2)
    return table[codes.long()] * scale.float().repeat_interleave(_GROUP, 1)
