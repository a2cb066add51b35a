"""A model of three times the memory that the process may have: streamed it verifies, as a whole it does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from _families import config_of, family_and_dims
from _kit import command, convert
from safetensors.torch import save_file

from mtp_convert.mapping.layout import Binding

pytestmark = pytest.mark.large
# Layers of 14 MB: beside the memory that they leave to weights, as small as those of a released model of 70 layers.
CONFIG = {
    **config_of("deepseek_v3"),
    "dtype": "bfloat16",
    "hidden_size": 512,
    "vocab_size": 8192,
    "num_hidden_layers": 144,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 48,
    "head_dim": 16,
    "v_head_dim": 32,
}


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code, streams, and the most memory that it held, in bytes."""

    code: int
    out: str
    err: str
    peak: int


def random_files(folder: Path, config: dict[str, Any]) -> int:
    """A Hugging Face folder of random bfloat16 weights, a file per layer, no more than one in memory; its bytes."""
    family, dims = family_and_dims(config)
    bindings = list(family.layout("hf", dims).bindings.values())
    folder.mkdir()
    torch.manual_seed(0)
    where: dict[str, str] = {}
    total = 0
    for number, (_, members) in enumerate(groupby(bindings, lambda b: b.tensor.split(".")[:3])):
        tensors = {b.tensor: random_weight(b) for b in members}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def random_weight(b: Binding) -> torch.Tensor:
    """Norms around 1, matrices that neither grow nor shrink what passes."""
    values = torch.randn(b.shape)
    values = 1 + 0.2 * values if len(b.shape) == 1 else values / prod(b.shape[1:]) ** 0.5
    return values.to(torch.float32 if b.high_precision else torch.bfloat16)


# In a small process of its own: a child's peak begins at the size of the process that starts it.
LAUNCH = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
code = subprocess.call(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


def limited(words: list[str], data: int) -> Ended:
    """Run a process with this limit on its private writable memory, touched or not, as `ulimit -d` sets it.

    It counts what the process asks for, and not the files that it maps, such as libraries. It also counts what the C
    library keeps for later: glibc is told to give freed blocks of 256 KiB and more back.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-c", LAUNCH, str(data), *words]
    done = subprocess.run(launch, capture_output=True, text=True, env=env, check=False)
    return Ended(done.returncode, done.stdout, done.stderr, int(done.stderr.split()[-1]))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes do not stay."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_weights_of_three_times_the_memory(scratch: Path) -> None:
    stored = random_files(scratch / "hf", CONFIG)
    convert(scratch / "hf", scratch / "megatron", "megatron")
    memory = stored // 3
    verify = command("verify", scratch / "hf", scratch / "megatron", "--device", "cpu", "--format", "json")
    streamed = limited([*verify, "--mode", "streamed"], memory)
    assert streamed.code == 0, streamed.err
    found = json.loads(streamed.out)
    assert found["ok"] is True
    assert found["mode"] == "streamed"
    assert len(found["places"]) == CONFIG["num_hidden_layers"] + 6
    sizes = f"weights {stored / 1e6:.0f} MB, limit {memory / 1e6:.0f} MB, peak {streamed.peak / 1e6:.0f} MB"
    print(f"{sizes} with the libraries' files, {found['seconds']:.0f} s")
    whole = limited([*verify, "--mode", "whole", "--levels", "forward"], memory)
    assert whole.code != 0
    assert "memory" in whole.err
