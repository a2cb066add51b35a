"""Tiny models of MiMo, MiMo-V2, Step, ERNIE and Inkling: configs, layouts, random folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from _kit import FIXTURES, Config, Tensors, hf_folder

from mtp_convert.adapters import find
from mtp_convert.mapping.family import Dims, Family
from mtp_convert.mapping.layout import Layout

NAMES = ["mimo", "mimo_v2_flash", "step3p5", "ernie4_5_moe", "inkling"]
Shapes = dict[str, tuple[int, ...]]


def tiny(name: str, **changed: object) -> Config:
    """A fixture's config with fields replaced (None removes one)."""
    config = json.loads((FIXTURES / "configs" / f"{name}.json").read_text()) | changed
    return {k: v for k, v in config.items() if v is not None or k not in changed}


def family_of(config: Config, depths: int | None = None) -> tuple[Family, Dims]:
    family, section = find(config)
    assert section == ()
    return family, family.dims(config, family.depths.declared(config) if depths is None else depths)


def layout(config: Config, name: str = "hf", depths: int | None = None, **words: str) -> Layout:
    family, dims = family_of(config, depths)
    return family.layout(name, dims, words)


def shapes(found: Layout) -> Shapes:
    return {n: b.shape for n, b in found.bindings.items()}


def random(found: Layout) -> Tensors:
    """Random weights: bfloat16, and float32 where a param keeps its type."""
    generator = torch.Generator().manual_seed(len(found.bindings))
    wide = {n for n, b in found.bindings.items() if all(found.params[p.param].high_precision for p in b.parts)}
    drawn = {n: torch.randn(b.shape, generator=generator) for n, b in found.bindings.items()}
    return {n: t if n in wide else t.bfloat16() for n, t in drawn.items()}


def folder(path: Path, config: Config, depths: int | None = None, **words: str) -> Path:
    return hf_folder(path, random(layout(config, depths=depths, **words)), config)
