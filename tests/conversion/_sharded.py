"""Two processes with one sharded module: filled from a checkpoint, read tensor by tensor, written by rank 0."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtp_convert.live import iter_tensors, load_into, save_from

RANKS = 2


def work(rank: int, source: Path, out: Path) -> None:
    """What each of the two processes does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dist.init_process_group(
        "gloo", init_method=f"file://{out / 'meet'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        torch.manual_seed(rank)  # so that a value that is not loaded differs between the ranks
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert any(isinstance(t, DTensor) for t in model.state_dict().values())
        load_into(model, source)
        named = dict(iter_tensors(model, hf_config=source))
        save_file(named, out / f"rank{rank}.safetensors")
        written = save_from(model, out / "hf", hf_config=source)
        assert (written is None) == (rank > 0)
    finally:
        dist.destroy_process_group()
