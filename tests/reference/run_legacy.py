"""What the real megatron-core stores in legacy checkpoints, and whether it loads ours.

    run_legacy.py --hf-config config.json --load TORCH_DIST --save DIR --check LEGACY --tp 2 ...

Loads a torch_dist checkpoint into the model of this process, writes its state as Megatron-LM's legacy format does, and
loads the file of this rank from LEGACY into the same model with every name accounted for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import megatron_cpu

megatron_cpu.prepare()

if TYPE_CHECKING:
    from torch import nn

SIZES = ("tp", "pp", "ep", "etp", "vpp")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-config", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="root of a torch_dist checkpoint")
    parser.add_argument("--save", type=Path, help="folder for mp_rank_*")
    parser.add_argument("--check", type=Path, help="folder with mp_rank_* to load")
    parser.add_argument("--pattern", help="layer pattern with | between pipeline stages")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int)
    return parser.parse_args()


def rank_file(folder: Path, sizes: dict[str, int]) -> Path:
    """Where Megatron-LM puts the state of this process."""
    from megatron.core import parallel_state as ps

    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    name += f"_{ps.get_pipeline_model_parallel_rank():03d}" if sizes["pp"] > 1 else ""
    name += f"_{ps.get_expert_model_parallel_rank():03d}" if sizes["ep"] > 1 else ""
    return folder / name / "model_optim_rng.pt"


def load_dist(models: list[nn.Module], root: Path) -> None:
    """A torch_dist checkpoint into all models of this process, every key accounted for."""
    from megatron.core import dist_checkpointing
    from run_hybrid import iteration_folder, sharded

    parts = {key(models, i): sharded(model) for i, model in enumerate(models)}
    found = dist_checkpointing.load(dict(parts), str(iteration_folder(root)), strict="raise_all")
    state = found[0] if isinstance(found, tuple) else found
    for i, model in enumerate(models):
        model.load_state_dict(state[key(models, i)], strict=False)


def key(models: list[nn.Module], i: int) -> str:
    """The entry of a model in a legacy state."""
    return f"model{i}" if len(models) > 1 else "model"


def save(models: list[nn.Module], path: Path) -> None:
    import torch
    from megatron.core import parallel_state as ps

    if 0 not in (ps.get_data_parallel_rank(), ps.get_expert_data_parallel_rank()):
        return
    path.parent.mkdir(parents=True)
    state = {key(models, i): m.state_dict_for_save_checkpoint() for i, m in enumerate(models)}
    torch.save({"args": argparse.Namespace(), "checkpoint_version": 3.0, "iteration": 1, **state}, path)


def check(models: list[nn.Module], path: Path) -> None:
    """Load a rank's file as Megatron-LM does, strictly."""
    import torch

    torch.serialization.add_safe_globals([argparse.Namespace])
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
    for i, model in enumerate(models):
        model.load_state_dict(state[key(models, i)], strict=True)
    print("loaded strictly:", sum(len(state[key(models, i)]) for i in range(len(models))), "names")


def main() -> None:
    args = options()
    import stand_ins

    stand_ins.install()
    import hybrid_model
    import torch

    given = {size: getattr(args, size) for size in SIZES}
    sizes = {size: given[size] or 1 for size in ("tp", "pp", "ep")} | {size: given[size] for size in ("etp", "vpp")}
    megatron_cpu.start(**sizes)
    config = json.loads(args.hf_config.read_text())
    dtype = getattr(torch, config.get("dtype") or "float32")
    depths = hybrid_model.depth_count(config, None)
    stages = range(sizes["vpp"]) if sizes["vpp"] else [None]
    models = [
        hybrid_model.build(config, dtype, depths, False, sizes, layer_pattern=args.pattern, vp_stage=stage)
        for stage in stages
    ]
    if args.load:
        load_dist(models, args.load)
    if args.save:
        save(models, rank_file(args.save, sizes))
    if args.check:
        check(models, rank_file(args.check, sizes))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
