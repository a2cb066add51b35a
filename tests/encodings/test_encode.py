"""Values as codes: the same bytes where nobody changed them, sound codes where somebody did, in little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _coded import WEIGHT, bits, coder, encode, filled, on_disk, plain, read, same_bits
from _reference import E4M3, E8M0, FORMATS, Tensors, blocks_max, ceil_power, to_fp4
from _reference import read as reference
from torch import Tensor

from mtp_convert.containers.base import Encoded, StoredTensor
from mtp_convert.encodings import fit
from mtp_convert.engine import encode as engine
from mtp_convert.engine.encode import CodedExtent
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError
from mtp_convert.quantization import Quantization

SHAPE = (300, 288)
BLOCKS = Quantization(method="fp8", fp8=((128, 128),))


def said(format: str) -> Quantization:
    if format == "fp8_powers_float":
        return replace(BLOCKS, powers=True)
    return BLOCKS if format in ("fp8_block", "fp8_powers") else Quantization()


def weight(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=made) * 0.02).bfloat16().float()


def encoding(folder: Path, format: str, raw: Tensors) -> Encoded:
    found = on_disk(folder, raw, said(format)).encoding
    assert found is not None
    return found


def bare(encoded: Encoded) -> Encoded:
    """The same form without the scales from before."""

    def empty(tensor: StoredTensor | None) -> StoredTensor | None:
        return None if tensor is None else replace(tensor, chunks=())

    return replace(encoded, scales=empty(encoded.scales), whole=empty(encoded.whole))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips and parts so small that a test tensor has many of both."""
    monkeypatch.setattr(engine, "STRIP", 1 << 15)
    monkeypatch.setattr(engine, "PART", 1 << 12)
    monkeypatch.setattr(fit, "PART", 1 << 14)


def stored(raw: Tensors) -> Tensors:
    """What belongs to the values."""
    return {n: t for n, t in raw.items() if not n.startswith("input")}


def loosened(raw: Tensors) -> Tensors:
    """Codes without one of their bits, so that none is large and no rule would choose these scales again."""
    name = "weight_packed" if "weight_packed" in raw else "weight"
    mask = 0x77 if raw[name].dtype == E4M3 else 0xBB
    return {**raw, name: (raw[name].view(torch.uint8) & mask).view(raw[name].dtype)}


@pytest.mark.parametrize(
    ("dtype", "tight"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False), (torch.float16, False)],
)
@pytest.mark.parametrize("format", FORMATS)
def test_unchanged_values_become_the_same_bytes(
    format: str, dtype: torch.dtype, tight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tight:
        small(monkeypatch)
    raw = loosened(FORMATS[format](weight()))
    values = plain(tmp_path / "values", reference(format, raw).to(dtype))
    found = encode(values, encoding(tmp_path / "raw", format, raw), 20_011)
    assert found.keys() == stored(raw).keys()
    assert all(same_bits(found[n], raw[n]) for n in found)


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "nvfp4", "fp8_tensor"])
def test_widened_values_are_unchanged(format: str, tmp_path: Path) -> None:
    """Training keeps bfloat16 values in float32: that is no change."""
    raw = FORMATS[format](weight())
    values = plain(tmp_path / "values", reference(format, raw).bfloat16().float())
    found = encode(values, encoding(tmp_path / "raw", format, raw))
    assert all(same_bits(found[n], raw[n]) for n in found)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_new_codes_are_the_formulas(format: str, tight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scales from before every block gets the scale of its largest magnitude."""
    if tight:
        small(monkeypatch)
    values = weight(seed=1)
    made = FORMATS[format](values)
    if format.startswith("mxfp4"):
        made = fresh_mxfp4(values, made)
    found = encode(
        plain(tmp_path / "values", values.bfloat16()), bare(encoding(tmp_path / "raw", format, made)), 20_011
    )
    assert found.keys() == stored(made).keys()
    for name in found:
        assert same_bits(found[name], made[name]), name


def fresh_mxfp4(values: Tensor, made: Tensors) -> Tensors:
    """The reference makes some exponents too large on purpose; here they are the smallest that fit."""
    scales = ceil_power(blocks_max(values, (1, 32)) / 6).float()
    codes = to_fp4(values, scales, 32)
    weight, scale = made
    return {weight: codes.view(made[weight].dtype), scale: scales.to(E8M0).view(made[scale].dtype)}


@pytest.mark.parametrize("format", ["fp8_block", "fp8_powers", "fp8_rows", "mxfp4", "nvfp4"])
def test_a_change_touches_its_block_alone(format: str, tmp_path: Path) -> None:
    raw = FORMATS[format](weight())
    before = reference(format, raw).bfloat16()
    after = before.clone()
    after[130, 40] = 0.5  # larger than anything there
    encoded = encoding(tmp_path / "raw", format, raw)
    if format == "nvfp4":
        after[130, 40] = before.abs().max()  # within reach of the scale of the tensor
        after[130, 41] *= 1.5
    found = encode(plain(tmp_path / "values", after), encoded)
    back = reference(format, found).bfloat16()
    height, width = encoded.scheme.grid(SHAPE).height, encoded.scheme.grid(SHAPE).width
    rows = slice(130 // height * height, 130 // height * height + height)
    cols = slice(40 // width * width, 40 // width * width + width)
    inside = torch.zeros(SHAPE, dtype=torch.bool)
    inside[rows, cols] = True
    assert torch.equal(back[~inside], before[~inside])
    largest = float(after[rows, cols].abs().max())
    step = largest * (2.0**-4 if "fp8" in format else 2.0**-2)
    assert float((back - after)[inside].abs().max()) <= step
    assert float(back[130, 40]) == pytest.approx(float(after[130, 40]), rel=0.13)
    scales = next(n for n in found if "scale" in n and n != "weight_scale_2")
    changed = (found[scales].view(torch.uint8) != raw[scales].view(torch.uint8)).sum()
    assert 0 < changed <= found[scales].element_size()


def test_a_scale_of_the_tensor_is_kept_while_it_reaches(tmp_path: Path) -> None:
    raw = FORMATS["nvfp4"](weight())
    values = reference("nvfp4", raw).bfloat16()
    encoded = encoding(tmp_path / "raw", "nvfp4", raw)
    values[0, 0] *= 100
    found = encode(plain(tmp_path / "large", values), encoded)
    assert found["weight_scale_2"] > raw["weight_scale_2"]
    assert float(found["weight_scale_2"]) == pytest.approx(float(values.abs().max()) / (6 * 448), rel=1e-6)
    back = reference("nvfp4", found)
    assert float((back - values.float()).abs().max()) <= float(values.abs().max()) / 4
    values[0, 0] = 0
    assert same_bits(encode(plain(tmp_path / "small", values), encoded)["weight_scale_2"], raw["weight_scale_2"])


def test_a_change_in_one_part_of_a_large_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale for the tensor: what the first part says must not be forgotten at the last."""
    small(monkeypatch)
    raw = loosened(FORMATS["fp8_tensor"](weight()))
    values = reference("fp8_tensor", raw).bfloat16()
    values[0, 0] = 1.0
    found = encode(plain(tmp_path / "values", values), encoding(tmp_path / "raw", "fp8_tensor", raw))
    assert float(found["weight_scale"]) == pytest.approx(1 / 448)
    assert float(reference("fp8_tensor", found)[0, 0]) == 1


def test_strips_remember_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are written after the codes are copied for strips without a change, for no other."""
    small(monkeypatch)
    raw = loosened(FORMATS["fp8_block"](weight((640, 288))))
    values = reference("fp8_block", raw).bfloat16()
    values[400:] *= 1.25
    source, encoded = plain(tmp_path / "values", values), encoding(tmp_path / "raw", "fp8_block", raw)
    writing = coder(source, encoded)
    codes, scales = (filled(CodedExtent(writing, role)) for role in ("codes", "scales"))
    found = encode(source, encoded)
    assert (codes, scales) == (bits(found["weight"]), bits(found["weight_scale_inv"]))
    same = found["weight_scale_inv"] == raw["weight_scale_inv"]
    assert same[:3].all()
    assert not same[3:].any()


def test_nan_does_not_spread_in_fp8(tmp_path: Path) -> None:
    raw = FORMATS["fp8_block"](weight())
    values = reference("fp8_block", raw).bfloat16()
    values[3, 5] = float("nan")
    values[4, 6] = 0.5
    back = reference("fp8_block", encode(plain(tmp_path / "v", values), encoding(tmp_path / "r", "fp8_block", raw)))
    assert back.isnan().nonzero().tolist() == [[3, 5]]
    assert back[4, 6] == 0.5
    assert float((back - values).nan_to_num(0).abs().max()) <= 0.5 / 16


def test_values_out_of_range_are_kept_beside_a_change(tmp_path: Path) -> None:
    """A scale whose products are infinite gives them back; another row has to be coded anew."""
    codes = weight((2, 64)).mul(1e4).to(E4M3)
    raw = {"weight": codes, "weight_scale": torch.tensor([[3e38], [1.0]])}
    tensor = on_disk(tmp_path / "raw", raw)
    values = read(tensor, "same", "same", (2, 64), "BF16")[WEIGHT].clone()
    assert values[0].isinf().any()
    values[1, 7] = 1000.0
    assert tensor.encoding is not None
    found = encode(plain(tmp_path / "values", values), tensor.encoding)
    assert found["weight_scale"][0] == raw["weight_scale"][0]
    assert found["weight_scale"][1] == pytest.approx(1000 / 448)


def test_small_blocks_of_nvfp4_are_not_lost(tmp_path: Path) -> None:
    """A block whose scale would round to 0 takes the smallest scale that there is."""
    values = torch.zeros(2, 16)
    values[0, 0] = 6 * 448.0
    values[1] = 2.0**-9
    made = FORMATS["nvfp4"](weight((2, 16)))
    encoded = bare(encoding(tmp_path / "raw", "nvfp4", made))
    back = reference("nvfp4", encode(plain(tmp_path / "values", values.bfloat16()), encoded))
    assert torch.equal(back[1], torch.full((16,), 2.0**-9))


def test_exponents_that_amax_would_not_give_are_kept(tmp_path: Path) -> None:
    """The blocks whose largest code is at most 3: their bytes are not what a fresh quantiser writes."""
    raw = FORMATS["mxfp4"](weight())
    values = plain(tmp_path / "values", reference("mxfp4", raw).bfloat16())
    encoded = encoding(tmp_path / "raw", "mxfp4", raw)
    fresh = encode(values, bare(encoded))
    assert not same_bits(fresh["weight"], raw["weight"])
    assert torch.equal(reference("mxfp4", fresh), reference("mxfp4", raw))
    assert same_bits(encode(values, encoded)["weight"], raw["weight"])


def test_special_values_survive(tmp_path: Path) -> None:
    """Negative zeros, NaN codes, blocks of zeros, scales of 0 and NaN scales."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(6, 1)
    codes[3] = 0
    codes[4] = 0x80
    codes[5] = 0x7F
    scales = torch.tensor([[1.0], [2.0**-120], [-3.0], [7.0], [0.0], [5.0]])
    raw = {"weight": codes.view(E4M3), "weight_scale": scales}
    tensor = on_disk(tmp_path / "raw", raw)
    values = plain(tmp_path / "values", read(tensor, "same", "same", (6, 256), "BF16")[WEIGHT])
    assert tensor.encoding is not None
    found = encode(values, tensor.encoding)
    assert same_bits(found["weight_scale"], raw["weight_scale"])
    assert same_bits(found["weight"], raw["weight"])


def test_nan_makes_a_block_of_fp4_nan(tmp_path: Path) -> None:
    """e2m1 has no NaN, so the exponent says it; other blocks are not touched."""
    raw = FORMATS["mxfp4"](weight((2, 64)))
    values = reference("mxfp4", raw).bfloat16()
    values[1, 5] = float("nan")
    back = reference("mxfp4", encode(plain(tmp_path / "v", values), encoding(tmp_path / "r", "mxfp4", raw)))
    assert back[1, :32].isnan().all()
    assert torch.equal(back[0], reference("mxfp4", raw)[0])
    assert torch.equal(back[1, 32:], reference("mxfp4", raw)[1, 32:])


@pytest.mark.parametrize("format", ["fp8_block", "fp8_tensor", "mxfp4", "nvfp4"])
def test_infinities_are_refused(format: str, tmp_path: Path) -> None:
    raw = FORMATS[format](weight())
    values = reference(format, raw).bfloat16()
    values[7, 9] = float("-inf")
    with pytest.raises(ConvertError) as caught:
        encode(plain(tmp_path / "values", values), encoding(tmp_path / "raw", format, raw))
    assert caught.value.code == "MTP028"
    assert WEIGHT in str(caught.value)


@pytest.mark.parametrize("format", ["fp8_block", "fp8_tensor", "mxfp4", "nvfp4"])
def test_windows_do_not_matter(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes follow from the values alone, whatever is asked for first."""
    small(monkeypatch)
    raw = FORMATS[format](weight())
    values = reference(format, raw).bfloat16()
    values[::7] *= 1.25
    source, encoded = plain(tmp_path / "values", values), encoding(tmp_path / "raw", format, raw)
    whole, pieces = encode(source, encoded), encode(source, encoded, 1013)
    assert all(same_bits(whole[n], pieces[n]) for n in whole)


def test_fused_rows_with_scales_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    chunks = [loosened(FORMATS["fp8_block"](weight((192, 256), seed))) for seed in range(4)]
    raw = {n: torch.cat([c[n] for c in chunks]) for n in ("weight", "weight_scale_inv")}
    tensor = on_disk(tmp_path / "raw", raw, BLOCKS, num_key_value_heads=4)
    values = plain(tmp_path / "values", torch.cat([reference("fp8_block", c) for c in chunks]).bfloat16())
    assert tensor.encoding is not None
    found = encode(values, tensor.encoding, 9001)
    assert all(same_bits(found[n], raw[n]) for n in raw)


def test_stacks(tmp_path: Path) -> None:
    codes = torch.randint(0, 127, (3, 130, 140), dtype=torch.uint8).view(E4M3)
    raw = {"weight": codes, "weight_scale_inv": torch.rand(3, 2, 2) + 0.5}
    each = [{n: t[e] for n, t in raw.items()} for e in range(3)]
    values = torch.stack([reference("fp8_block", r) for r in each]).bfloat16()
    found = encode(plain(tmp_path / "values", values), encoding(tmp_path / "raw", "fp8_block", raw), 7001)
    assert all(same_bits(found[n], raw[n]) for n in raw)


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "nvfp4", "fp8_tensor", "fp8_rows"])
def test_memory_is_bounded(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the tensor, no more than a strip of values is gathered at once."""
    small(monkeypatch)
    gathered: list[int] = []
    fill = TensorExtent.fill

    def counting(self: TensorExtent, reader: Reader, out: np.ndarray, lo: int, hi: int) -> None:
        gathered.append((hi - lo) // 2)
        fill(self, reader, out, lo, hi)

    monkeypatch.setattr(TensorExtent, "fill", counting)
    shape = (384, 768)
    raw = FORMATS[format](weight(shape))
    writing = coder(
        plain(tmp_path / "values", reference(format, raw).bfloat16()), encoding(tmp_path / "r", format, raw)
    )
    filled(CodedExtent(writing, "codes"), 100_003)
    assert len(gathered) > 8
    assert max(gathered) <= engine.STRIP < shape[0] * shape[1] // 8
