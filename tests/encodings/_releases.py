"""Encoded checkpoints made of the golden models, as releases look: some weights in codes, the rest in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _kit import AUTOMODEL, Config, Tensors, config_of, golden_config, hf_folder
from _reference import FORMATS
from _reference import read as reference
from safetensors.torch import load_file
from torch import Tensor

FLOAT32 = ("e_score_correction_bias", "A_log", "D", "dt_bias", "attn_sink", "gate.bias", "_fn", "_base", "_scale")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
POWERS = {**FP8, "scale_fmt": "ue8m0"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head", "*conv1d*"]}
ROWS = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["re:.*gate$"]}
QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8_block": FP8,
    "fp8_powers": POWERS,
    "fp8_powers_float": POWERS,
    "fp8_tensor": MODELOPT,
    "fp8_rows": {**COMPRESSED, **ROWS},
    "mxfp4": POWERS,
    "mxfp4_packed": COMPRESSED,
    "nvfp4": MODELOPT,
    "nvfp4_packed": COMPRESSED,
}
Choose = Callable[[str], str | None]  # the format of a weight


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") and "eh_proj" not in name


def all_linear(format: str) -> Choose:
    """Every linear weight in one format."""
    return lambda name: format if is_linear(name) else None


def mixed(name: str) -> str | None:
    """A ModelOpt release: NVFP4 experts, FP8 shared experts and Mamba projections, MTP in high precision."""
    if name.startswith("mtp.") or not is_linear(name):
        return None
    if ".experts." in name:
        return "nvfp4"
    return "fp8_tensor" if "shared_experts" in name or "in_proj" in name or "out_proj" in name else None


def streams(name: str) -> str | None:
    """A DeepSeek-V4 release: MXFP4 experts, FP8 with powers of two in the other linear layers, also inside MTP."""
    if not name.endswith(".weight") or "compressor" in name:
        return None
    if ".experts." in name:
        return "mxfp4"
    words = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj", "w1", "w2", "w3")
    return "fp8_powers" if name.split(".")[-2] in words else None


def rounded(name: str, tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() and not name.endswith(FLOAT32) else tensor


def encoded(values: Tensors, choose: Choose) -> tuple[Tensors, Tensors]:
    """The tensors of a release, and the float32 values that its codes stand for."""
    raw: Tensors = {}
    meant: Tensors = {}
    for name, tensor in values.items():
        format = choose(name)
        if format is None:
            raw[name] = rounded(name, tensor)
            continue
        made = FORMATS[format](tensor.bfloat16().float())
        raw |= {name.removesuffix("weight") + n: t for n, t in made.items()}
        meant[name] = reference(format, made)
    return raw, meant


def release(folder: Path, choose: Choose, model: str = "nemotron_d1", **quantization: Any) -> tuple[Path, Tensors]:  # noqa: ANN401
    """A folder with these weights in codes, and the values that they stand for."""
    raw, meant = encoded(load_file(AUTOMODEL / model / "model.safetensors"), choose)
    config: Config = golden_config(model, dtype="bfloat16")
    if quantization:
        config["quantization_config"] = quantization
    return hf_folder(folder, raw, config), meant


def of_format(folder: Path, format: str, model: str = "nemotron_d1") -> tuple[Path, Tensors]:
    """Every linear weight of a golden model in one format."""
    return release(folder, all_linear(format), model, **QUANTIZATION[format])


def modelopt(folder: Path) -> tuple[Path, Tensors]:
    """The mixed release, with scales of the key-value cache and ModelOpt's own file."""
    source, meant = release(folder, mixed, **MODELOPT)
    raw = load_file(source / "model.safetensors")
    for name in [n for n in raw if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        stem = name.removesuffix("weight")
        raw[f"{stem}{stem.split('.')[-2][0]}_scale"] = torch.tensor(0.5)
    config = config_of(source)
    shutil.rmtree(source)
    hf_folder(source, raw, config)
    data = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION", "exclude_modules": []}}
    (source / "hf_quant_config.json").write_text(json.dumps(data))
    return source, meant
