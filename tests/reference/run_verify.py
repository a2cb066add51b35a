"""Judges checkpoints against Megatron ones that the installed megatron-core runs: the backend of `verify`.

run_verify.py [--local] OUT.json A B [A B ...]

Side A is run by whatever runs its layout. --local: with megatron-core's own layers and nothing that stands for a
package but triton, else with the stand-ins for TransformerEngine and mamba_ssm. The package is found on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import megatron_cpu


def install(*, local: bool) -> None:
    """What has to be there before megatron-core is imported."""
    if local:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile with what stands for triton
        megatron_cpu._stub_triton()
        return
    megatron_cpu.prepare()
    import gpt_model
    import stand_ins

    stand_ins.install()
    gpt_model.install_delta_rule()
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # what deterministic mode asks of TransformerEngine


def main(out: str, *folders: str) -> None:
    import torch

    from mtp_convert.checkpoint import open_checkpoint
    from mtp_convert.verify.judge import Conditions, judge
    from mtp_convert.verify.side import open_side

    torch.set_num_threads(1)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for a, b in zip(folders[::2], folders[1::2], strict=True):
        sides = open_side(open_checkpoint(Path(a))), open_side(open_checkpoint(Path(b)), backend="megatron-core")
        streamed = len(found) % 2 == 1  # both ways have their turn
        verdict = judge(*sides, ids, Conditions(torch.float32, torch.device("cpu"), streamed))
        found.append(
            {
                "backends": [side.facts.backend for side in sides],
                "places": {p.place: [p.relative, p.threshold] for p in verdict.places},
            }
        )
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--local"]
    install(local=len(words) < len(sys.argv) - 1)
    main(*words)
