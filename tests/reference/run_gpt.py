"""The real megatron-core builds the GPTModel that a checkpoint's own training arguments describe, loads it and runs it.

run_gpt.py --load CHECKPOINT --tokens tokens.safetensors --out out.safetensors [--legacy] [--dense-mtp]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import megatron_cpu

megatron_cpu.prepare()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="root of the checkpoint")
    parser.add_argument("--legacy", action="store_true", help="it is one mp_rank_00 file, not torch_dist")
    parser.add_argument("--dense-mtp", action="store_true", help="MTP layers have no experts")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = options()
    import gpt_model
    import stand_ins

    stand_ins.install()
    gpt_model.install_delta_rule()
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # what deterministic mode asks of TransformerEngine
    megatron_cpu.start()
    import torch
    from megatron.core import dist_checkpointing
    from run_hybrid import forward, iteration_folder, load

    folder = iteration_folder(args.load)
    dense = {"mtp_experts": False} if args.dense_mtp else {}
    if args.legacy:
        torch.serialization.add_safe_globals([argparse.Namespace])
        state = torch.load(folder / "mp_rank_00" / "model_optim_rng.pt", map_location="cpu", weights_only=True)
        model = gpt_model.build(state["args"], **dense)
        model.load_state_dict(state["model"], strict=True)
        described = state["args"]
    else:
        described = dist_checkpointing.load_common_state_dict(str(folder))["args"]
        model = gpt_model.build(described, **dense)
        load(model, folder, "raise_all")
    forward(model, args.tokens, args.out, getattr(described, "mtp_num_layers", 0))


if __name__ == "__main__":
    main()
