"""What encoded tensors mean, written from the formulas in plain torch, value by value where that is clearest.

decode(stored, block)     codes times scales, in float64 rounded once to float32
FORMATS[name](weight)     a high-precision matrix as the tensors of a release
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu


def e4m3_value(code: int) -> float:
    """One sign bit, four exponent bits with bias 7, three fraction bits; no infinity."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def e8m0_value(code: int) -> float:
    """A power of two; the last code is NaN."""
    return float("nan") if code == 255 else 2.0 ** (code - 127)


def e2m1_value(code: int) -> float:
    """Bit 3 is the sign."""
    return float(FP4[code & 7]) * (-1.0 if code & 8 else 1.0)


def values_of(codes: Tensor) -> Tensor:
    """Float64 values of stored codes: float8 as they are, bytes as two e2m1 codes, the low half first."""
    if codes.dtype == E4M3:
        table = torch.tensor([e4m3_value(c) for c in range(256)], dtype=torch.float64)
        return table[codes.view(torch.uint8).long()]
    table = torch.tensor([e2m1_value(c) for c in range(16)], dtype=torch.float64)
    raw = codes.view(torch.uint8).long()
    return table[torch.stack([raw & 15, raw >> 4], dim=-1)].flatten(-2)


def scales_of(stored: Tensor) -> Tensor:
    """Float64 values of stored scales; bytes are exponents."""
    if stored.dtype in (E8M0, torch.uint8):
        table = torch.tensor([e8m0_value(c) for c in range(256)], dtype=torch.float64)
        return table[stored.view(torch.uint8).long()]
    if stored.dtype == E4M3:
        return values_of(stored)
    return stored.double()


def spread(scales: Tensor, rows: int, cols: int, block: tuple[int, int]) -> Tensor:
    """[block rows, block columns] to one scale per value; the last blocks may be cut."""
    down, across = scales.repeat_interleave(block[0], -2), None
    across = down[..., :rows, :].repeat_interleave(block[1], -1)
    return across[..., :cols]


def decode(codes: Tensor, scales: Tensor | None, block: tuple[int, int], whole: float = 1.0) -> Tensor:
    """Float32 values [rows, columns]. Products of float32 numbers are exact in float64 up to the last rounding."""
    values = values_of(codes)
    if scales is None:
        return values.float()
    found = scales_of(scales)
    rows, cols = values.shape[-2:]
    height, width = block[0] or rows, block[1] or cols
    found = found.reshape(*values.shape[:-2], -(-rows // height), -(-cols // width))
    return (values * spread(found, rows, cols, (height, width)) * whole).float()


def blocks_max(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of every block, by a loop."""
    rows, cols = weight.shape
    height, width = block[0] or rows, block[1] or cols
    found = torch.zeros(-(-rows // height), -(-cols // width))
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            part = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            found[i, j] = part.abs().max()
    return found


def ceil_power(values: Tensor) -> Tensor:
    """The next power of two upwards."""
    exact = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64)
    return exact[torch.searchsorted(exact, values.double())]


def to_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The nearest codes under scales that are given."""
    rows, cols = weight.shape
    by = spread(scales.double(), rows, cols, (block[0] or rows, block[1] or cols))
    return (weight.double() / by).float().clamp(-448, 448).to(E4M3)


def to_fp4(weight: Tensor, scales: Tensor, width: int) -> Tensor:
    """The nearest e2m1 codes, two to a byte. Ties go to the even code."""
    by = spread(scales.double(), *weight.shape, (1, width))
    wanted = (weight.double() / by).float().double()
    far = (wanted.abs()[..., None] - FP4.double()).abs()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of two equal distances
    codes = order[far[..., order].argmin(-1)] | torch.where(wanted.signbit(), 8, 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp8_block(weight: Tensor) -> Tensors:
    """DeepSeek-V3: 128x128 blocks, float32 scales."""
    scales = blocks_max(weight, (128, 128)) / 448
    scales = torch.where(scales == 0, 1.0, scales)
    return {"weight": to_fp8(weight, scales, (128, 128)), "weight_scale_inv": scales}


def fp8_powers(weight: Tensor) -> Tensors:
    """DeepSeek-V4: powers of two as e8m0, under another name."""
    scales = ceil_power(blocks_max(weight, (128, 128)) / 448).float()
    return {"weight": to_fp8(weight, scales, (128, 128)), "scale": scales.to(E8M0)}


def fp8_powers_float(weight: Tensor) -> Tensors:
    """DeepSeek-V3.1: powers of two as float32."""
    scales = ceil_power(blocks_max(weight, (128, 128)) / 448).float()
    return {"weight": to_fp8(weight, scales, (128, 128)), "weight_scale_inv": scales}


def fp8_tensor(weight: Tensor) -> Tensors:
    """ModelOpt: one float32 scale, and one for the activations."""
    scale = weight.abs().max().reshape(1, 1) / 448
    found = to_fp8(weight, scale, (0, 0))
    return {"weight": found, "weight_scale": scale.reshape(()), "input_scale": torch.tensor(0.25)}


def fp8_rows(weight: Tensor) -> Tensors:
    """compressed-tensors: one bfloat16 scale per row."""
    scales = (blocks_max(weight, (1, 0)) / 448).bfloat16()
    return {"weight": to_fp8(weight, scales.float(), (1, 0)), "weight_scale": scales}


def mxfp4(weight: Tensor) -> Tensors:
    """DeepSeek-V4 experts: int8 pairs of e2m1, e8m0 scales of 32 columns. Some blocks use less than the full range."""
    exponents = ceil_power(blocks_max(weight, (1, 32)) / 6)
    exponents[::3] *= 2
    scales = exponents.float()
    return {"weight": to_fp4(weight, scales, 32).view(torch.int8), "scale": scales.to(E8M0)}


def mxfp4_packed(weight: Tensor) -> Tensors:
    """compressed-tensors: the same under other names, exponents as bytes."""
    found = mxfp4(weight)
    return {"weight_packed": found["weight"].view(torch.uint8), "weight_scale": found["scale"].view(torch.uint8)}


def nvfp4(weight: Tensor) -> Tensors:
    """ModelOpt: e4m3 scales of 16 columns times a float32 scale of the tensor."""
    whole = weight.abs().max() / (6 * 448)
    scales = (blocks_max(weight, (1, 16)) / 6 / whole).clamp(max=448).to(E4M3)
    codes = to_fp4(weight, scales.float() * whole, 16)
    return {
        "weight": codes,
        "weight_scale": scales,
        "weight_scale_2": whole.reshape(()),
        "input_scale": torch.tensor(0.125),
    }


def nvfp4_packed(weight: Tensor) -> Tensors:
    """compressed-tensors: the scale of the tensor divides."""
    whole = 6 * 448 / weight.abs().max()
    scales = (blocks_max(weight, (1, 16)) / 6 * whole).clamp(max=448).to(E4M3)
    codes = to_fp4(weight, scales.float() / whole, 16)
    return {
        "weight_packed": codes,
        "weight_scale": scales,
        "weight_global_scale": whole.reshape(1),
        "input_global_scale": torch.ones(1),
    }


FORMATS: Mapping[str, Callable[[Tensor], Tensors]] = {
    f.__name__: f
    for f in (
        fp8_block,
        fp8_powers,
        fp8_powers_float,
        fp8_tensor,
        fp8_rows,
        mxfp4,
        mxfp4_packed,
        nvfp4,
        nvfp4_packed,
    )
}


def read(format: str, stored: Tensors) -> Tensor:
    """The float32 values of a weight in one of the formats."""
    codes = stored.get("weight_packed", stored.get("weight"))
    assert codes is not None
    scales = next(stored[n] for n in ("weight_scale_inv", "scale", "weight_scale") if n in stored)
    if format.startswith("nvfp4"):
        over = stored.get("weight_global_scale")
        if over is not None:  # a division is no product: rounded once from the exact quotient
            return (decode(codes, scales, (1, 16)).double() / over.double()).float()
        return decode(codes, scales, (1, 16), float(stored["weight_scale_2"]))
    block = {"fp8_tensor": (0, 0), "fp8_rows": (1, 0)}.get(format, (1, 32) if format.startswith("mx") else (128, 128))
    assert prod(scales.shape) > 0
    return decode(codes, scales, block)
