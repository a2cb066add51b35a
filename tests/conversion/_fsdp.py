"""What a rank does that saves a model under FSDP; a module of its own because every rank imports it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 2


def distributed_save(rank: int, weights: Path, folder: Path) -> None:
    """Parameters are DTensors whose rows the ranks share; buffers are whole on each."""
    torch.set_num_threads(1)
    rendezvous = f"file://{weights.with_name('rendezvous')}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = {
        f"module.{n}": t if n.endswith("expert_bias") else distribute_tensor(t, mesh, [Shard(0)])
        for n, t in load_file(weights).items()
    }
    save({"model": model, "iteration": 1}, storage_writer=FileSystemWriter(folder, sync_files=False))
    torch.distributed.destroy_process_group()
