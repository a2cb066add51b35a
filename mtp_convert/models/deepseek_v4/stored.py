"""The tensors of a safetensors folder, found by header and decoded one at a time.

Releases store most matrices [o, i] quantised, with a tensor of scales beside each: FP8 (e4m3, one scale for each
block of 128 x 128), and for routed experts FP4 (e2m1, two columns in a byte, one scale for 32 columns of a row).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_BLOCK = 128  # rows and columns that share an FP8 scale
_GROUP = 32  # columns that share an FP4 scale
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; 8 more is negative
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I64", "I32", "I16"})


@dataclass(frozen=True)
class Header:
    """Where one tensor is and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class StoredTensors:
    """All tensors of a folder's safetensors file, or of the files that its index names.

    Raises ValueError if the index names a file outside the folder, or two files hold one name.
    """

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, Header] = {}
        self._open: dict[Path, Any] = {}
        for file in _files(folder):
            handle: Any = safe_open(file, "pt")
            self._open[file] = handle
            names = set(handle.keys())
            if twice := sorted(names & self.headers.keys()):
                raise ValueError(f"tensors in more than one file: {twice}")
            for name in names:
                part = handle.get_slice(name)
                self.headers[name] = Header(file, tuple(part.get_shape()), part.get_dtype())

    def scale_of(self, name: str) -> str | None:
        """The tensor with the scales of this one, if it is quantised."""
        if self.headers[name].dtype not in ("F8_E4M3", "I8") or not name.endswith(".weight"):
            return None
        names = (name.removesuffix("weight") + "scale", name + "_scale_inv")
        return next((n for n in names if n in self.headers), None)

    def problem(self, name: str, like: Tensor) -> str | None:
        """Why this tensor cannot be decoded into one like `like`, or None."""
        header = self.headers[name]
        quantised = header.dtype in ("F8_E4M3", "I8")
        if quantised and like.is_floating_point() and like.dim() == 2:
            return self._quantised_problem(name, header, *like.shape)
        if header.dtype not in (_FLOATS if like.is_floating_point() else _INTEGERS):
            return f"{name} is {header.dtype}, expected {'floating point' if like.is_floating_point() else 'integers'}"
        if header.shape != tuple(like.shape):
            return f"{name} has shape {header.shape}, expected {tuple(like.shape)}"
        return None

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to float32 if need be."""
        stored = self._load(name)
        scale = self.scale_of(name)
        if scale is None:
            return stored
        return (_from_fp4 if self.headers[name].dtype == "I8" else _from_fp8)(stored, self._load(scale))

    def _load(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self.headers[name].file].get_tensor(name)
        return tensor

    def _quantised_problem(self, name: str, header: Header, rows: int, columns: int) -> str | None:
        fp4 = header.dtype == "I8"
        shape = (rows, columns // 2) if fp4 else (rows, columns)
        scales = (rows, columns // _GROUP) if fp4 else (-(-rows // _BLOCK), -(-columns // _BLOCK))
        scale = self.scale_of(name)
        if scale is None:
            return f"{name} is {header.dtype} but has no scales beside it"
        if header.shape != shape:
            return f"{name} has shape {header.shape}, expected {shape}"
        if self.headers[scale].shape != scales:
            return f"{scale} has shape {self.headers[scale].shape}, expected {scales}"
        return None


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    listed: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"the index names files outside its folder: {outside}")
    return [folder / name for name in names]


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
