"""Which tensors make a weight: names, shapes, lists; and everything that does not fit, in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _coded import all_on_disk, on_disk
from _reference import E4M3, FORMATS, Tensors
from torch import Tensor

from mtp_convert import quantization
from mtp_convert.encoded import renamed
from mtp_convert.errors import ConvertError
from mtp_convert.quantization import Quantization

BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def said(tmp_path: Path, hf_quant: object = None, **fields: object) -> Quantization:
    """What is read from a config with this `quantization_config`, or from ModelOpt's file."""
    if hf_quant is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(hf_quant))
    config = {"quantization_config": fields} if fields else {}
    return quantization.read(config, (), tmp_path)


def weight(rows: int = 200, cols: int = 160) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.02


def linear(name: str, format: str, rows: int = 200, cols: int = 160) -> Tensors:
    return {f"{name}.{n}": t for n, t in FORMATS[format](weight(rows, cols)).items()}


def problems(folder: Path, raw: Tensors, found: Quantization, **config: object) -> list[str]:
    with pytest.raises(ConvertError) as caught:
        all_on_disk(folder / "model", raw, found, **config)
    assert caught.value.code == "MTP031"
    return [p.line() for p in caught.value.problems]


KINDS = {
    "fp8_block": "fp8 128x128",
    "fp8_powers": "fp8 128x128 ue8m0",
    "fp8_powers_float": "fp8 128x128 ue8m0",
    "fp8_tensor": "fp8 per tensor",
    "fp8_rows": "fp8 per row",
    "mxfp4": "mxfp4",
    "mxfp4_packed": "mxfp4",
    "nvfp4": "nvfp4",
    "nvfp4_packed": "nvfp4",
}


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_told_apart(format: str, tmp_path: Path) -> None:
    fields = BLOCKS if "powers" in format or "block" in format else {}
    powers = {"scale_fmt": "ue8m0"} if "powers" in format else {}
    tensor = on_disk(tmp_path / "model", FORMATS[format](weight()), said(tmp_path, **fields, **powers))
    assert tensor.encoding is not None
    assert tensor.encoding.scheme.kind == KINDS[format]
    assert tensor.shape == (200, 160)
    assert tensor.dtype.name == "BF16"


def test_one_tensor_of_values_remains(tmp_path: Path) -> None:
    """Scales are no tensors of their own, those of activations and caches are listed with their owner."""
    raw = {
        **linear("a.k_proj", "nvfp4"),
        "a.k_proj.k_scale": torch.tensor(1.0),
        "a.v_proj.weight": weight().bfloat16(),
        "a.v_proj.v_scale": torch.tensor(1.0),
        "a.k_scale": torch.tensor(1.0),
        "norm.weight": torch.ones(4),
        "norm.scale": torch.ones(4),
    }
    stored = all_on_disk(tmp_path / "model", raw, said(tmp_path))
    assert set(stored.tensors) == {"a.k_proj.weight", "a.v_proj.weight", "norm.weight", "norm.scale"}
    assert stored.raw.keys() == raw.keys()
    owners = dict(stored.beside)
    assert owners.pop("a.k_scale") in ("a.k_proj.weight", "a.v_proj.weight")
    assert owners == {
        "a.k_proj.input_scale": "a.k_proj.weight",
        "a.k_proj.k_scale": "a.k_proj.weight",
        "a.v_proj.v_scale": "a.v_proj.weight",
    }
    assert stored.nbytes == sum(t.nbytes for t in raw.values())


def test_values_alone_are_left_alone(tmp_path: Path) -> None:
    raw = {"a.weight": weight(), "a.ids": torch.zeros(4, dtype=torch.int64), "flags": torch.zeros(3, dtype=torch.uint8)}
    stored = all_on_disk(tmp_path / "model", raw, said(tmp_path))
    assert stored.tensors.keys() == raw.keys()
    assert not stored.raw
    assert not stored.warnings


def test_a_description_without_codes_is_told(tmp_path: Path) -> None:
    stored = all_on_disk(tmp_path / "model", {"a.weight": weight()}, said(tmp_path, **BLOCKS))
    assert "describes fp8" in stored.warnings[0]


def test_all_problems_at_once(tmp_path: Path) -> None:
    cut = linear("d", "fp8_block")
    cut["d.weight_scale_inv"] = cut["d.weight_scale_inv"][:1]
    raw = {
        "a.weight": weight().to(E4M3),
        "b.weight": torch.zeros(8, 8, dtype=torch.int8),
        "c.weight": weight().bfloat16(),
        "c.weight_scale_inv": torch.ones(2, 2),
        **cut,
        **linear("e", "fp8_block"),
        "e.scale": torch.ones(2, 2),
        "f.weight": weight().to(torch.float8_e5m2),
        **linear("g", "fp8_block"),
        "g.weight_zero_point": torch.ones(1),
        "h.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        **linear("head", "fp8_block"),
    }
    found = problems(tmp_path, raw, said(tmp_path, **BLOCKS, modules_to_not_convert=["head"]))
    for words in (
        "a.weight holds codes and has no scale",
        "b.weight holds codes and has no scale",
        "c.weight_scale_inv is the scale of c.weight, which is not quantised: got BF16",
        "d.weight_scale_inv does not fit d.weight [200, 160]: got [1, 2], expected [2, 2]",
        "e.weight has more than one scale",
        "f.weight cannot be read as codes",
        "g.weight is stored in a way that is not known",
        "h.weight_packed cannot be read as codes",
        "head.weight is quantised, and the ignore list says it is not in config.json",
    ):
        assert [line for line in found if line.startswith(words)], words
    assert len(found) == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_scale": torch.ones(200, 10)}, "is stored in a way that is not known"),
        ({"weight_scale_2": torch.ones(2)}, "weight_scale_2 cannot be read as a scale"),
        ({"weight_scale": torch.ones(200, 10, dtype=torch.int32)}, "weight_scale cannot be read as a scale"),
        ({"weight_scale_2": None}, "is stored in a way that is not known"),
        ({"weight_scale": torch.ones(200, 5).to(E4M3)}, "does not fit"),
        ({"weight_scale": torch.ones(10, 200).to(E4M3)}, "does not fit"),
    ],
    ids=["float32", "two", "int32", "no second", "too few", "turned"],
)
def test_scales_that_do_not_fit(change: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    changed: dict[str, Tensor | None] = {**FORMATS["nvfp4"](weight()), **change}
    raw = {f"m.{n}": t for n, t in changed.items() if t is not None}
    (line,) = problems(tmp_path, raw, said(tmp_path))
    assert words in line


def test_group_size_of_the_config_counts(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    found = said(tmp_path, quant_method="compressed-tensors", config_groups={"group_0": {"weights": weights}})
    assert problems(tmp_path, linear("m", "nvfp4"), found)


@pytest.mark.parametrize(
    ("weights", "format"),
    [
        ({"num_bits": 8, "strategy": "channel"}, "fp8_rows"),
        ({"num_bits": 8, "strategy": "tensor"}, "fp8_tensor"),
        ({"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}, "fp8_block"),
        ({"num_bits": 4, "strategy": "tensor_group", "group_size": 16}, "nvfp4_packed"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, "mxfp4_packed"),
    ],
)
def test_strategies(weights: dict[str, object], format: str, tmp_path: Path) -> None:
    found = said(tmp_path, quant_method="compressed-tensors", config_groups={"group_0": {"weights": weights}})
    tensor = on_disk(tmp_path / "model", FORMATS[format](weight()), found)
    assert tensor.encoding is not None
    wrong = "fp8_block" if format == "fp8_rows" else "fp8_rows"
    if weights["num_bits"] == 8:
        assert problems(tmp_path / "other", linear("m", wrong), found)


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        ("a.b.proj", True),
        ("a.b", True),
        ("proj", True),
        ("roj", False),
        ("b.proj.x", False),
        ("a.*", True),
        ("a.b*", True),
        ("*.proj", True),
        ("a.c*", False),
        ("re:a\\.b\\..*", True),
        ("re:.*c.*", False),
        ("re:[", False),
    ],
)
def test_ignore_lists(pattern: str, ignored: bool, tmp_path: Path) -> None:
    for name in ("modules_to_not_convert", "ignore", "exclude_modules"):
        assert said(tmp_path, quant_method="modelopt", **{name: [pattern]}).ignores("a.b.proj") is ignored


def test_modelopts_own_file(tmp_path: Path) -> None:
    layers = {"m": {"quant_algo": "NVFP4"}, "plain": {"quant_algo": "FP8"}, "elsewhere": {"quant_algo": "FP8"}}
    data = {"quantization": {"quant_algo": "MIXED_PRECISION", "exclude_modules": ["x*"], "quantized_layers": layers}}
    found = said(tmp_path, data)
    raw = {**linear("m", "nvfp4"), "plain.weight": weight().bfloat16(), **linear("x1", "fp8_tensor")}
    assert problems(tmp_path, raw, found) == [
        "x1.weight is quantised, and the ignore list says it is not in hf_quant_config.json",
        "plain is listed as quantised in hf_quant_config.json: got BF16",
    ]


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    for raw in (linear("m", "fp8_tensor"), {"m.qweight": torch.zeros(8, 8, dtype=torch.int32)}):
        (line,) = problems(tmp_path, raw, said(tmp_path, quant_method="gptq"))
        assert line.startswith("quant_method in config.json: got 'gptq'")


def test_float8_without_scales_needs_a_word(tmp_path: Path) -> None:
    found = quantization.read({"dtype": "float8_e4m3fn"}, (), tmp_path)
    tensor = on_disk(tmp_path / "model", {"weight": weight().to(E4M3)}, found)
    assert tensor.encoding is not None
    assert tensor.encoding.scheme.kind == "fp8"
    assert problems(tmp_path / "other", {"m.weight": weight().to(E4M3)}, said(tmp_path))


def test_chunks_need_the_number_of_heads(tmp_path: Path) -> None:
    chunks = [FORMATS["fp8_block"](weight(192, 128)) for _ in range(2)]
    raw = {f"m.{n}": torch.cat([c[n] for c in chunks]) for n in ("weight", "weight_scale_inv")}
    assert all_on_disk(tmp_path / "model", raw, said(tmp_path, **BLOCKS), num_key_value_heads=2).raw
    assert problems(tmp_path / "other", raw, said(tmp_path, **BLOCKS), num_key_value_heads=3)


def test_names_follow_a_weight() -> None:
    assert renamed("a.q.weight_scale", "a.q.weight", "b.q.weight") == "b.q.weight_scale"
    assert renamed("a.q.scale", "a.q.weight", "b.r.weight") == "b.r.scale"
    assert renamed("a.k_scale", "a.q.weight", "b.c.q.weight") == "b.c.k_scale"
    assert renamed("e.up_scale_inv", "e.up", "f.up") == "f.up_scale_inv"


def test_configs_of_the_same_model() -> None:
    config = {"a": 1, "quantization_config": {"x": 1}, "text": {"expert_dtype": "fp4", "dtype": "float8_e4m3fn"}}
    plain = quantization.without(config, ("text",))
    assert plain == {"a": 1, "text": {"dtype": "bfloat16"}}
    again = quantization.with_fields({**plain, "a": 2}, config, ("text",))
    assert list(again) == list(config)
    assert again == {**config, "a": 2, "text": {"expert_dtype": "fp4", "dtype": "bfloat16"}}
