"""The commands that come next, ready to paste: after a conversion, and on a model card."""

from __future__ import annotations

import shlex
from pathlib import Path

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.options import Options


def serving(steps: int, model: str) -> list[str]:
    """vLLM's and SGLang's commands for a Hugging Face folder or repository, drafting with the MTP heads if any run."""
    name = shlex.quote(model)
    vllm, sglang = f"vllm serve {name}", f"python -m sglang.launch_server --model-path {name}"
    if not steps:
        return [vllm, sglang]
    speculative = f'{{"method": "mtp", "num_speculative_tokens": {steps}}}'
    drafts = f"--speculative-num-steps {steps} --speculative-eagle-topk 1 --speculative-num-draft-tokens {steps + 1}"
    return [
        f"{vllm} --speculative-config '{speculative}'",
        f"{sglang} --speculative-algorithm EAGLE {drafts}",
    ]


def after(src: str, dst: Path, source: Checkpoint, options: Options, steps: int) -> list[str]:
    """What to do with a conversion: prove it, go back, run it."""
    a, b = shlex.quote(src), shlex.quote(str(dst))
    own, to = source.layout.name, options.to
    whole = not options.part and options.depths is None
    found = [f"mtp-convert verify {a} {b}"] if whole else [f"mtp-convert inspect {b}"]
    if own != to and whole:
        coded = " --encoding source" if source.stored.raw else ""
        found.append(f"mtp-convert {to}-to-{own} {b} OUT{coded}")
    if to == "hf" and not options.part:
        found.append(serving(steps, str(dst))[0])
    return found
