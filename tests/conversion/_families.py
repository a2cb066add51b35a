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
# Other models of a family: its tiny config with fields changed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3-indexer": (
        "deepseek_v3",
        {"model_type": "deepseek_v32", "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8},
    ),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {
            "rope_parameters": None,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 16,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "glm4_moe-air": ("glm4_moe", {"use_qk_norm": False, "n_group": 2, "num_nextn_predict_layers": 1}),
    "glm_moe_dsa-own": ("glm_moe_dsa", {"index_topk_freq": 1}),
    "mellum-dense": ("mellum", {"mtp_mlp_layer_types": ["dense"]}),
    "mimo-one": ("mimo", {"num_nextn_predict_layers": 1, "tie_word_embeddings": True}),
    "qwen3-one": ("qwen3", {"num_nextn_predict_layers": 1}),
    "qwen3_5-dense": (
        "qwen3_5",
        {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "num_experts": None,
            "num_experts_per_tok": None,
            "moe_intermediate_size": None,
            "shared_expert_intermediate_size": None,
            "intermediate_size": 24,
        },
    ),
}


def config_of(name: str) -> dict[str, Any]:
    """The tiny config of a family, or of a variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    found: dict[str, Any] = {**json.loads(CONFIGS[family].read_text()), **changes}
    return found


@cache
def family_of(name: str) -> tuple[Family, Dims]:
    """A family by its registered name, and the sizes of its tiny config."""
    return family_and_dims(config_of(name))


def family_and_dims(config: Any) -> tuple[Family, Dims]:  # noqa: ANN401 - JSON
    """The family of a config.json, and its sizes."""
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
