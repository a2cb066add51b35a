"""Name lists of released sizes: real headers over files without content, inspected and planned as users do it."""

from __future__ import annotations

import json
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import pytest
from _families import family_and_dims
from _kit import Cli

from mtp_convert.containers.safetensors import header_bytes
from mtp_convert.mapping.layout import Binding

pytestmark = pytest.mark.large
SHARD = 5 * 10**9  # bytes of a file
SUPER = {  # Nemotron 3 Super: 40 M, 40 E and 8 * as released, in an order of our own
    "model_type": "nemotron_h",
    "hidden_size": 4096,
    "vocab_size": 131072,
    "hybrid_override_pattern": "MEMEMEMEM*E" * 8,
    "mtp_hybrid_override_pattern": "*E",
    "num_hidden_layers": 88,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
# Of Nemotron 3 Ultra's total size; the released widths are not known to us.
ULTRA = {
    **SUPER,
    "hidden_size": 8192,
    "hybrid_override_pattern": "MEMEMEMEM*E" * 10,
    "num_hidden_layers": 110,
    "num_attention_heads": 64,
    "mamba_num_heads": 256,
    "moe_intermediate_size": 5120,
    "moe_shared_expert_intermediate_size": 10240,
    "moe_latent_size": 2048,
}
GLM_5 = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
MODELS = {"nemotron-3-super": SUPER, "550b": ULTRA, "glm-5": GLM_5}
# Tensors of the MTP depth, without copies: 2 per expert and 16; 3 per expert, 3 shared, 2 of the router, 7 of
# attention, 5 of the indexer, 6 norms and projections.
DEPTH = {"nemotron-3-super": 2 * 512 + 16, "550b": 2 * 512 + 16, "glm-5": 3 * 256 + 3 + 2 + 7 + 5 + 6}


def empty_folder(folder: Path, config: dict[str, Any]) -> list[str]:
    """A released folder in bfloat16 whose values are holes of the file system; the tensors' names."""
    family, dims = family_and_dims(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    where, sizes, total = {}, [], 0
    for binding in family.layout("hf", dims).bindings.values():
        sizes.append((total // SHARD, binding))
        total += 2 * prod(binding.shape)
    for number, group in groupby(sizes, key=lambda pair: pair[0]):
        name = f"model-{number + 1:05d}.safetensors"
        bindings = [binding for _, binding in group]
        write_holes(folder / name, bindings)
        where |= {binding.tensor: name for binding in bindings}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(where)


def write_holes(path: Path, bindings: list[Binding]) -> None:
    """A safetensors file of that size, of which only the header takes room."""
    rows = [(b.tensor, "BF16", b.shape, 2 * prod(b.shape)) for b in bindings]
    header = header_bytes(rows, {"format": "pt"})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + sum(size for *_, size in rows))


@pytest.mark.parametrize("name", MODELS)
def test_a_released_name_list_is_inspected_and_planned(name: str, tmp_path: Path, cli: Cli) -> None:
    tensors = empty_folder(tmp_path / "hf", MODELS[name])
    found = cli("inspect", tmp_path / "hf", "--format", "json").data
    assert (found["tensors"], found["mtp_tensors"]) == (len(tensors), DEPTH[name])
    plan = cli("plan", tmp_path / "hf", "--to", "megatron", "--format", "json").data
    assert (plan["mtp_stored_depths"], plan["notes"]) == (1, [])
    assert plan["nbytes"] > 0.99 * found["nbytes"]
