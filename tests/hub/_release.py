"""A release in small, and what of its bytes a command needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from _families import config_of
from _kit import TINY
from safetensors.torch import save_file

from mtp_convert import adapters
from mtp_convert.containers import safetensors

HEADS = f"layers.{config_of('deepseek_v3')['num_hidden_layers']}."  # the MTP depth


def release(path: Path, experts: int, shards: int) -> Path:
    """A release in small: MTP heads at the end, with their copies of both ends."""
    path.mkdir()
    config = {**config_of("deepseek_v3"), "n_routed_experts": experts}
    family, _ = adapters.find(config)
    layout = family.layout("hf", family.dims(config, 1))
    generator = torch.Generator().manual_seed(5)
    tensors = {b.tensor: torch.randn(b.shape, generator=generator).bfloat16() for b in layout.bindings.values()}
    for copy, param in layout.copies.items():
        tensors[copy] = tensors[layout.home[param][0].tensor].clone()
    assert len(layout.copies) == 2
    names = sorted(tensors, key=lambda n: (HEADS in n, n))
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, path / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    (path / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(TINY / "tokenizer.json", path / "tokenizer.json")
    return path


def description(folder: Path) -> int:
    """Bytes that say what the model is: the small files and every header."""
    headers = safetensors.read(folder).headers.values()
    small = (folder / name for name in ("config.json", safetensors.INDEX))
    return sum(8 + len(h) for h in headers) + sum(p.stat().st_size for p in small)


def heads(folder: Path, *, ends: bool) -> int:
    """Bytes of the MTP heads' tensors."""
    tensors = safetensors.read(folder).tensors
    shared = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")
    found = [t for n, t in tensors.items() if n.startswith(f"model.{HEADS}") or n.endswith(shared)]
    return sum(t.nbytes for t in found if ends or not t.name.endswith(shared))


def show(what: str, got: int, needed: int, folder: Path) -> None:
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{what}: {got} bytes moved, {needed} needed, ratio {got / needed:.3f}; the repository has {size}")
