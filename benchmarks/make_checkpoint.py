"""Makes a synthetic Nemotron-H checkpoint of any size with the tensor sizes of a real one.

    python benchmarks/make_checkpoint.py --size 4GB --out /tmp/bench/source

Widths are those of a 120B Nemotron 3 (expert matrices of 5.5 MB, latent size 1024, grouped-query attention, Mamba2
layers) with fewer experts, a smaller vocabulary and as many layers as fit the size; one MTP depth of `*E`. Values are
random bytes that are finite in bfloat16, so a file system that compresses has nothing to gain.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mtp_convert.adapters.nemotron_h import FAMILY
from mtp_convert.containers.safetensors import header_bytes
from mtp_convert.mapping.layout import Binding
from mtp_convert.options import parse_size

BLOCK = 1 << 22


def config(layers: str) -> dict[str, Any]:
    """A config.json with backbone pattern `layers`."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "vocab_size": 32768,
        "hybrid_override_pattern": layers,
        "mtp_hybrid_override_pattern": "*E",
        "num_hidden_layers": len(layers),
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 5376,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "n_routed_experts": 32,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }


def bindings(layers: str) -> list[Binding]:
    """Every tensor of that model in the Hugging Face layout."""
    return list(FAMILY.layout("hf", FAMILY.dims(config(layers), 1)).bindings.values())


def nbytes(b: Binding) -> int:
    """Stored size: bfloat16, and float32 where precision must stay."""
    return prod(b.shape) * (4 if b.high_precision else 2)


def pattern(size: int) -> str:
    """As many layers of the repeating pattern as fit `size`."""
    layers = "M"
    for letter in "E*EM" * 10_000:
        if sum(map(nbytes, bindings(layers + letter))) > size:
            return layers
        layers += letter
    raise ValueError("size too large")


def shards(tensors: list[Binding], limit: int) -> Iterator[list[Binding]]:
    """Tensors in order, cut into files of at most `limit` bytes."""
    members: list[Binding] = []
    for b in tensors:
        if members and sum(map(nbytes, members)) + nbytes(b) > limit:
            yield members
            members = []
        members.append(b)
    yield members


def write_shard(path: Path, members: list[Binding], seed: int) -> None:
    """One file of random numbers."""
    described = [(b.tensor, "F32" if b.high_precision else "BF16", b.shape, nbytes(b)) for b in members]
    header = header_bytes(described, {"format": "pt"})
    noise = np.random.default_rng(seed)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        left = sum(map(nbytes, members))
        while left:
            block = noise.integers(0, 1 << 16, BLOCK // 2, dtype=np.uint16) & 0xBFFF  # exponent never all ones
            f.write(block.tobytes()[: min(left, BLOCK)])
            left -= min(left, BLOCK)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB", help="total payload, e.g. 1GB, 4GB, 8GB")
    parser.add_argument("--shard", default="1GB", help="largest file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    layers = pattern(parse_size(args.size))
    args.out.mkdir(parents=True)
    files = list(shards(bindings(layers), parse_size(args.shard)))
    weight_map = {}
    for i, members in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_shard(args.out / name, members, i)
        weight_map.update({b.tensor: name for b in members})
    total = sum(nbytes(b) for m in files for b in m)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (args.out / "config.json").write_text(json.dumps(config(layers), indent=2))
    print(f"{args.out}: {total / 1e9:.2f} GB, {len(weight_map)} tensors, {len(files)} files, layers {layers}")


if __name__ == "__main__":
    main()
