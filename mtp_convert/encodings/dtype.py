"""Element types under one name each, with their spelling in safetensors and in torch. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """An element type; `name` is the safetensors spelling."""

    name: str
    torch_name: str
    itemsize: int

    def torch(self) -> torch.dtype:
        """The torch dtype (imports torch)."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    def __str__(self) -> str:
        return self.name


DTYPES: tuple[DType, ...] = (
    DType("F64", "float64", 8),
    DType("F32", "float32", 4),
    DType("F16", "float16", 2),
    DType("BF16", "bfloat16", 2),
    DType("I64", "int64", 8),
    DType("I32", "int32", 4),
    DType("I16", "int16", 2),
    DType("I8", "int8", 1),
    DType("U8", "uint8", 1),
    DType("U16", "uint16", 2),
    DType("U32", "uint32", 4),
    DType("U64", "uint64", 8),
    DType("BOOL", "bool", 1),
    DType("F8_E4M3", "float8_e4m3fn", 1),
    DType("F8_E5M2", "float8_e5m2", 1),
    DType("F8_E8M0", "float8_e8m0fnu", 1),
)
# What safetensors defines beside them. Releases store codes of four bits as U8 or I8, so that no model needs these yet.
UNREAD: frozenset[str] = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})
BY_NAME: dict[str, DType] = {d.name: d for d in DTYPES}
BY_TORCH_NAME: dict[str, DType] = {d.torch_name: d for d in DTYPES}

# What people type after --dtype. `auto` (keep every tensor as stored) is handled by the caller.
CAST_TARGETS: dict[str, DType] = {
    "bf16": BY_NAME["BF16"],
    "fp16": BY_NAME["F16"],
    "fp32": BY_NAME["F32"],
}
FLOATS: frozenset[str] = frozenset({"F64", "F32", "F16", "BF16"})
