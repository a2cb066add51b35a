"""Runs the real megatron-core on a CPU: loads, checks, runs or writes a hybrid model with MTP.

Run it with the Python of an environment that `setup_megatron.sh` made.
    run_hybrid.py      --hf-config config.json --load ROOT --tokens io.safetensors --out out.safetensors [--resave DIR]
    run_hybrid.py save --hf-config config.json --seed 3 --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_cpu

# Here and not in main: a save starts processes that import this file again and then megatron-core.
megatron_cpu.prepare()

if TYPE_CHECKING:
    from torch import nn


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="run", choices=["run", "save"])
    parser.add_argument("--hf-config", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="root of the checkpoint, or its iter_* folder")
    parser.add_argument("--strict", default="raise_all", help="strictness of dist_checkpointing.load")
    parser.add_argument("--mtp-num-layers", type=int, help="MTP steps (default: the config's stored depths)")
    parser.add_argument("--repeated", action="store_true", help="one stored depth runs in every step")
    parser.add_argument("--dtype", help="of the model; default: the config's")
    parser.add_argument("--tokens", type=Path, help="safetensors with input_ids or tokens; without: only load")
    parser.add_argument("--out", type=Path, help="run: safetensors of the outputs; save: folder")
    parser.add_argument("--resave", type=Path, help="folder for a torch_dist copy of what was loaded")
    parser.add_argument("--seed", type=int, default=1)
    for size in ("tp", "pp", "ep"):
        parser.add_argument(f"--{size}", type=int, default=1, help="above 1 with RANK, WORLD_SIZE and MASTER_*")
    return parser.parse_args()


def iteration_folder(root: Path) -> Path:
    """The folder that the tracker file names, as Megatron-LM finds it."""
    tracker = root / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return root
    text = tracker.read_text().strip()
    return root / (text if text == "release" else f"iter_{int(text):07d}")


def sharded(model: nn.Module, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's sharded state dict for a checkpoint with this content metadata."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={**(content or {}), "dp_cp_group": group})


def load(model: nn.Module, folder: Path, strict: str) -> dict[str, Any]:
    """The checkpoint into the model, every key accounted for; returns the common state."""
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    wanted = sharded(model, common.get("content_metadata"))
    found = dist_checkpointing.load(wanted, str(folder), strict=strict)
    state, *mismatch = found if isinstance(found, tuple) else (found,)
    names = set(model.state_dict())
    result = model.load_state_dict({k: v for k, v in state.items() if k not in common}, strict=False)
    # Only a lenient strictness gets here without every `_extra_state`; megatron-core ignores those then too.
    missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise SystemExit(f"missing {missing}, unexpected {result.unexpected_keys}")
    print(f"loaded {len(names)} keys, strict={strict}, mismatch {mismatch or 'none'}")
    return common


def save(model: nn.Module, root: Path, common: dict[str, Any]) -> None:
    """A torch_dist checkpoint as Megatron-LM lays it out."""
    import torch
    from megatron.core import dist_checkpointing

    folder = root / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    plain = {k: v for k, v in common.items() if k != "content_metadata"}
    state = {**plain, "checkpoint_version": 3.0, "iteration": 1, **sharded(model)}
    dist_checkpointing.save(state, str(folder), content_metadata={})
    if torch.distributed.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("1")


def forward(model: nn.Module, tokens: Path, out: Path, depths: int) -> None:
    """The outputs for the tokens of a file."""
    from hybrid_model import run
    from safetensors.torch import load_file, save_file

    given = load_file(tokens)
    outputs = run(model, given["input_ids" if "input_ids" in given else "tokens"], depths)
    save_file(outputs, out)
    print({name: tuple(value.shape) for name, value in outputs.items()})


def main() -> None:
    args = options()
    import stand_ins

    stand_ins.install()
    import torch

    sizes = {"tp": args.tp, "pp": args.pp, "ep": args.ep}
    megatron_cpu.start(**sizes)
    import hybrid_model

    config = json.loads(args.hf_config.read_text())
    dtype = getattr(torch, args.dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    depths = hybrid_model.depth_count(config, args.mtp_num_layers)
    model = hybrid_model.build(config, dtype, depths, args.repeated, sizes)
    if args.mode == "save":
        assert int(os.environ.get("WORLD_SIZE", "1")) == 1, "save alone, then use run --resave for other sizes"
        hybrid_model.randomise(model, args.seed)
        save(model, args.out, {})
        return
    common = load(model, iteration_folder(args.load), args.strict)
    if args.resave:
        save(model, args.resave, common)
    if args.tokens:
        assert max(sizes.values()) == 1, "the forward pass is for one process"
        forward(model, args.tokens, args.out, depths)


if __name__ == "__main__":
    main()
