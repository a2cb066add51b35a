"""Every tensor of a torch_dist checkpoint as megatron-core's own loader sees it, whole and without a model.

    plain_load.py CHECKPOINT OUT.safetensors      prints the keys of the common state as JSON

Works with every release since 0.16: no model class is involved. Run it with the Python of `setup_megatron.sh`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import megatron_cpu

megatron_cpu.prepare()


def main(checkpoint: str, out: str) -> None:
    from run_hybrid import iteration_folder

    megatron_cpu.start()
    import torch
    from megatron.core import dist_checkpointing
    from safetensors.torch import save_file

    folder = str(iteration_folder(Path(checkpoint)))
    tensors = dist_checkpointing.load_plain_tensors(folder)
    common = dist_checkpointing.load_common_state_dict(folder)
    save_file({k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)}, out)
    print(json.dumps({"common": sorted(common), "args": sorted(vars(common["args"])) if "args" in common else None}))


if __name__ == "__main__":
    main(*sys.argv[1:])
