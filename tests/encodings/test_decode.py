"""Values of encoded weights through the engine: every format, every order of the target, every odd byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _coded import WEIGHT, all_on_disk, as_tensor, filled, on_disk, read, same_bits, steps
from _reference import E4M3, E8M0, FORMATS, Tensors, decode
from _reference import read as reference
from torch import Tensor

from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.engine import coded
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.files import TensorExtent
from mtp_convert.mapping.views import Side
from mtp_convert.quantization import Quantization

SHAPES = ((200, 288), (128, 256), (3, 32), (1, 160))
BLOCKS = Quantization(method="fp8", fp8=((128, 128),))


def weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=made) * 0.02).bfloat16().float()


def said(format: str) -> Quantization:
    """What the config of a release in this format says about blocks."""
    return BLOCKS if format in ("fp8_block", "fp8_powers", "fp8_powers_float") else Quantization()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_values_are_the_formulas(format: str, shape: tuple[int, int], tmp_path: Path) -> None:
    raw = FORMATS[format](weight(shape))
    found = read(on_disk(tmp_path, raw, said(format)), "same", "same", shape)[WEIGHT]
    assert same_bits(found, reference(format, raw))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_values_are_rounded_once(format: str, dtype: str, tmp_path: Path) -> None:
    raw = FORMATS[format](weight((130, 96)))
    found = read(on_disk(tmp_path, raw, said(format)), "same", "same", (130, 96), dtype)[WEIGHT]
    assert same_bits(found, reference(format, raw).to(BY_NAME[dtype].torch()))


ORDERS: dict[tuple[str, str], Callable[[Tensor], Tensors]] = {
    ("same", "transposed"): lambda w: {WEIGHT: w.T},
    ("rows", "apart"): lambda w: dict(zip(("0.weight", "1.weight"), w.chunk(2, 0), strict=True)),
    ("columns", "apart"): lambda w: dict(zip(("0.weight", "1.weight"), w.chunk(2, 1), strict=True)),
    ("grouped", "apart"): lambda w: {f"{e}.weight": w.unflatten(0, (2, 2, -1))[:, e].flatten(0, 1) for e in (0, 1)},
    ("grouped", "apart_turned"): lambda w: {
        f"{e}.weight": w.unflatten(0, (2, 2, -1))[:, e].flatten(0, 1).T for e in (0, 1)
    },
    ("columns", "grouped"): lambda w: {WEIGHT: torch.cat([c.chunk(2, 0)[g] for g in (0, 1) for c in w.chunk(2, 1)], 0)},
    ("rows", "turned"): lambda w: {WEIGHT: w.T},
    ("columns", "stacked"): lambda w: {WEIGHT: torch.stack(w.chunk(2, 1))},
}


@pytest.mark.parametrize("format", ["fp8_block", "nvfp4"])
@pytest.mark.parametrize("order", ORDERS, ids=" to ".join)
@pytest.mark.parametrize("strip", [1 << 18, 5000])
def test_any_order(
    format: str, order: tuple[str, str], strip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coded, "STRIP", strip)
    shape = 200, 288
    raw = FORMATS[format](weight(shape))
    source, target = order
    param = {"rows": (100, 288), "grouped": (100, 288), "columns": (200, 144)}.get(source, shape)
    wanted = ORDERS[order](reference(format, raw))
    found = read(on_disk(tmp_path, raw, said(format)), source, target, param)
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[n], wanted[n]) for n in wanted)


def test_every_code_and_exponent(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    raw = {"weight": codes.view(torch.int8), "scale": exponents.view(E8M0)}
    found = read(on_disk(tmp_path, raw), "same", "same", (256, 512))[WEIGHT]
    wanted = decode(codes, exponents, (1, 32))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found[255].isnan().all()
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    assert torch.equal(found[:255].signbit(), wanted[:255].signbit())
    assert found[0, 2] == 2.0**-128


def test_every_float8_code(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1).view(E4M3)
    scales = torch.tensor([[0.5], [-2.0], [0.0], [3.0]])
    found = read(on_disk(tmp_path, {"weight": codes, "weight_scale": scales}), "same", "same", (4, 256))[WEIGHT]
    wanted = decode(codes, scales, (1, 0))
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    assert torch.equal(found.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    assert torch.equal(found[kept].signbit(), wanted[kept].signbit())


def test_nan_keeps_its_sign_in_bfloat16(tmp_path: Path) -> None:
    codes = torch.tensor([[0x7F, 0xFF, 0x80, 0x00]], dtype=torch.uint8).view(E4M3)
    raw = {"weight": codes, "weight_scale": torch.tensor(2.0)}
    found = read(on_disk(tmp_path, raw), "same", "same", (1, 4), "BF16")[WEIGHT]
    assert [hex(v & 0xFFFF) for v in found.view(torch.int16)[0].tolist()] == ["0x7fc0", "0xffc0", "0x8000", "0x0"]


def test_products_round_once_to_float32(tmp_path: Path) -> None:
    raw = FORMATS["nvfp4"](weight((64, 64)))
    raw["weight_scale_2"] = torch.tensor(1.0000001)
    found = read(on_disk(tmp_path, raw), "same", "same", (64, 64))[WEIGHT]
    blocks = raw["weight_scale"].float().repeat_interleave(16, 1)
    twice = decode(raw["weight"], None, (0, 0)) * (blocks * raw["weight_scale_2"])
    assert same_bits(found, reference("nvfp4", raw))
    assert not torch.equal(found, twice)


def test_fused_rows_with_scales_of_their_own(tmp_path: Path) -> None:
    """[Q K V] per key-value head: blocks start anew with every chunk of 192 rows."""
    chunks = [FORMATS["fp8_block"](weight((192, 256), seed)) for seed in range(4)]
    raw = {n: torch.cat([c[n] for c in chunks]) for n in ("weight", "weight_scale_inv")}
    tensor = on_disk(tmp_path, raw, BLOCKS, num_key_value_heads=4)
    wanted = torch.cat([reference("fp8_block", c) for c in chunks])
    assert same_bits(read(tensor, "same", "transposed", (768, 256))[WEIGHT], wanted.T.contiguous())


@pytest.mark.parametrize("scale", [(2, 2, 2), (2, 1, 1), (2,), ()], ids=["blocks", "each", "flat", "all"])
def test_stacks(scale: tuple[int, ...], tmp_path: Path) -> None:
    """Stacked experts: every matrix has blocks of its own, or one scale, or all of them have one."""
    blocks = scale == (2, 2, 2)
    codes = torch.randint(0, 127, (2, 130, 140), dtype=torch.uint8).view(E4M3)
    scales = torch.rand(scale) + 0.5
    raw = {"m.weight": codes, "m.weight_scale": scales}
    tensor = all_on_disk(tmp_path, raw, BLOCKS if blocks else None).tensors[WEIGHT]
    each = scales.expand(2) if scale == () else scales
    block = (128, 128) if blocks else (0, 0)
    wanted = torch.stack([decode(codes[e], each[e].reshape(-1, 2 if blocks else 1), block) for e in range(2)])
    found = read(tensor, "stacked", "apart", (130, 140))
    assert all(same_bits(found[f"{e}.weight"], wanted[e]) for e in range(2))


def test_packed_columns_from_an_odd_one(tmp_path: Path) -> None:
    raw = FORMATS["mxfp4"](weight((5, 64)))
    tensor = on_disk(tmp_path, raw)
    wanted = reference("mxfp4", raw)
    (step,) = steps("same", "same", (5, 64))
    extent = TensorExtent(step, {WEIGHT: tensor}, BY_NAME["F32"], (1, 3), (3, 41))
    assert same_bits(as_tensor(filled(extent, 4 * 7), "F32", (3, 41)), wanted[1:4, 3:44].contiguous())


def test_comparing_sees_values(tmp_path: Path) -> None:
    raw = FORMATS["fp8_block"](weight((130, 64)))
    extent = StoredExtent(on_disk(tmp_path, raw, BLOCKS), rows=129)
    found = as_tensor(filled(extent, 1000 * 2), "BF16", (129, 64))
    assert same_bits(found, reference("fp8_block", raw).bfloat16()[:129])


def test_without_scales_values_are_the_codes(tmp_path: Path) -> None:
    codes = weight((6, 8)).to(E4M3)
    tensor = on_disk(tmp_path, {"weight": codes}, Quantization(unscaled=True))
    assert same_bits(read(tensor, "same", "same", (6, 8))[WEIGHT], codes.float())


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)], ids=["rows first", "columns first"])
@pytest.mark.parametrize("step", [1, 1000], ids=["dense", "spread"])
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_strips_are_bounded(format: str, dims: tuple[int, int], step: int, tmp_path: Path) -> None:
    """However large a tensor is, a strip's codes and scales are not: only headers are looked at here."""
    tensor = on_disk(tmp_path, FORMATS[format](weight((128, 128))), said(format))
    huge = replace(tensor, shape=(1 << 20, 1 << 16))
    assert huge.encoding is not None
    grid = huge.encoding.scheme.grid(huge.shape)
    sizes = (512, 4096) if dims == (0, 1) else (4096, 512)  # a window of 4 MiB
    side = Side((5, 77), dims, tuple(step if d == 0 else 1 for d in dims))
    boxes = list(coded.strips(huge, side, sizes))
    assert sum(a * b for _, (a, b) in boxes) == 512 * 4096
    assert len({origin for origin, _ in boxes}) == len(boxes) > 4
    for origin, part in boxes:
        rows, cols = coded.walks(huge.shape, side.moved(origin), part)
        assert rows.sizes[0] * cols.span <= coded.STRIP
        assert (rows.span / grid.height) * (cols.span / grid.width) <= 2 * coded.STRIP
