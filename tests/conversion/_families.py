"""A tiny random checkpoint of every family, in its released names."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _kit import FIXTURES, hf_folder
from torch import Tensor

from mtp_convert import adapters
from mtp_convert.mapping.family import Dims, Family

CONFIGS = {p.stem: p for p in sorted((FIXTURES / "configs").glob("*.json"))}


def config_of(name: str) -> dict[str, Any]:
    """The tiny config of a family."""
    found: dict[str, Any] = json.loads(CONFIGS[name].read_text())
    return found


@cache
def family_of(name: str) -> tuple[Family, Dims]:
    """A family by its registered name, and the sizes of its tiny config."""
    config: Any = config_of(name)
    family, section = adapters.find(config)
    for field in section:
        config = config[field]
    return family, family.dims(config, family.depths.declared(config))


def random_tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the released names: matrices small, norms around 1 or 0, nothing equal to its neighbour."""
    family, dims = family_of(name)
    layout = family.layout("hf", dims)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for binding in layout.bindings.values():
        if binding.parts[0].param.endswith("token_table"):  # experts by token id
            rows, chosen = binding.shape
            experts = int(config_of(name)["n_routed_experts"])
            values = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(rows)])
        elif len(binding.shape) == 1:
            values = 1 + 0.2 * torch.randn(binding.shape, generator=generator)
        else:
            values = 0.3 * torch.randn(binding.shape, generator=generator)
        tensors[binding.tensor] = values
    return tensors


def random_folder(name: str, folder: Path, seed: int = 0) -> Path:
    """The same as a Hugging Face folder."""
    return hf_folder(folder, random_tensors(name, seed), config_of(name))
