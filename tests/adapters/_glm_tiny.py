"""Tiny models of GLM, LongCat, Ling, HY and MiniMax-M3: configs, layouts, random folders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from _kit import FIXTURES, Config, Tensors, hf_folder

from mtp_convert.adapters import find
from mtp_convert.mapping.family import Dims, Family
from mtp_convert.mapping.layout import Layout

Shapes = dict[str, tuple[int, ...]]
NAMES = (
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "glm5_next",
    "longcat_flash",
    "bailing_moe",
    "bailing_hybrid",
    "bailing_hybrid 2.5",
    "hy_v3",
    "minimax_m3",
)
LIGHTNING = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "short_conv_kernel_size": None,
    "no_kda_lora": None,
    "gated_attention_proj_granularity_type": None,
    "q_lora_rank": 16,
    "use_qk_norm": True,
    "group_norm_size": 4,
}


@cache
def stored(name: str) -> str:
    return (FIXTURES / "configs" / f"{name}.json").read_text()


def tiny(name: str, **changed: object) -> Config:
    """A fixture's config with fields replaced (None removes one), in the section of the language model."""
    config: Config = json.loads(stored(name.partition(" ")[0]))
    section = config.get("text_config", config)
    section.update({**(LIGHTNING if name.endswith("2.5") else {}), **changed})
    for field in [f for f, value in section.items() if value is None]:
        del section[field]
    return config


def text(config: Config) -> Config:
    """The section of the language model."""
    found: Config = config.get("text_config", config)
    return found


def family_of(config: Config, depths: int | None = None) -> tuple[Family, Dims]:
    family, section = find(config)
    assert section == (("text_config",) if "text_config" in config else ())
    return family, family.dims(text(config), family.depths.declared(text(config)) if depths is None else depths)


def layout(config: Config, name: str = "hf", depths: int | None = None, **words: str) -> Layout:
    """A layout in the released spelling, which depends on whether the config is a section of a larger one's."""
    family, dims = family_of(config, depths)
    nested = family.nested if name == "hf" and "text_config" in config else {}
    return family.layout(name, dims, {**nested, **words})


def shapes(found: Layout) -> Shapes:
    return {n: b.shape for n, b in found.bindings.items()}


def random(found: Layout) -> Tensors:
    """Random weights: bfloat16, and float32 where a param keeps its type."""
    generator = torch.Generator().manual_seed(len(found.bindings))
    wide = {n for n, b in found.bindings.items() if b.high_precision}
    drawn = {n: torch.randn(b.shape, generator=generator) for n, b in found.bindings.items()}
    return {n: t if n in wide else t.bfloat16() for n, t in drawn.items()}


def folder(path: Path, config: Config, depths: int | None = None, **words: str) -> Path:
    return hf_folder(path, random(layout(config, depths=depths, **words)), config)
