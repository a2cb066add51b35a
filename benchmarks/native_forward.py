"""Time of the native Nemotron-V3 tree against transformers' own model with the same weights, in paired runs.

    python benchmarks/native_forward.py --hidden 512 --blocks 8 --length 512 --rounds 9

A pair is one run of each model on the same input, in alternating order; the ratio is transformers' time over ours:
above 1 we are faster. The largest difference of their logits is printed; in bfloat16 it is not 0, since we keep Mamba's
scalars in float32. `decoding` is one token behind a prompt of the given length, the mean of 16 such steps.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, NemotronHConfig
from transformers import NemotronHForCausalLM as TransformersModel
from transformers.utils import logging

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM

STEPS = 16
KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}


@dataclass(frozen=True)
class Task:
    """Something both models do."""

    name: str
    theirs: Callable[[], object]
    ours: Callable[[], object]


def config(hidden: int, blocks: int) -> NemotronHConfig:
    """The released proportions at another size: about half of the blocks Mamba, one in eight attention."""
    pattern = ("ME" * 3 + "M*") * blocks
    return NemotronHConfig(
        layers_block_type=[KINDS[symbol] for symbol in pattern[:blocks]],
        mtp_layers_block_type=["full_attention", "moe"],
        num_nextn_predict_layers=1,
        vocab_size=8192,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        mamba_num_heads=hidden // 32,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=2,
        chunk_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=hidden // 2,
        moe_shared_expert_intermediate_size=hidden,
        intermediate_size=2 * hidden,
        routed_scaling_factor=2.5,
    )


def models(
    settings: NemotronHConfig, device: torch.device, dtype: torch.dtype
) -> tuple[TransformersModel, NemotronHForCausalLM]:
    """Both models with the same weights, of the same types."""
    torch.manual_seed(0)
    theirs = TransformersModel(settings)
    state = theirs.state_dict()
    renamed = {"model.embeddings.weight": "model.embed_tokens.weight", "model.norm_f.weight": "model.norm.weight"}
    ours = NemotronHForCausalLM(settings)
    ours.load_state_dict({renamed.get(name, name): tensor for name, tensor in state.items()}, strict=False)
    for model in (theirs, ours):
        torch.nn.Module.to(model, device, dtype).eval()
    return theirs, ours


def forward(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


def train(model: torch.nn.Module, ids: Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def decode(model: torch.nn.Module, ids: Tensor, *, cache: Callable[[], object]) -> Callable[[], None]:
    """What runs `STEPS` single tokens behind `ids`, the prompt being read before."""
    held = cache()
    with torch.no_grad():
        model(ids, past_key_values=held, use_cache=True)

    def steps() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(ids[:, -1:], past_key_values=held, use_cache=True)

    return steps


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    _wait(device)
    begin = perf_counter()
    run()
    _wait(device)
    return perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(task: Task, rounds: int, device: torch.device) -> str:
    """One row: medians in milliseconds, and the range of the paired ratios."""
    timed(task.theirs, device), timed(task.ours, device)  # first runs compile, allocate and warm up
    pairs = []
    for number in range(rounds):
        order = (task.theirs, task.ours) if number % 2 else (task.ours, task.theirs)
        seconds = {id(run): timed(run, device) for run in order}
        pairs.append((seconds[id(task.theirs)], seconds[id(task.ours)]))
    parts = STEPS if task.name == "decoding" else 1
    theirs, ours = (statistics.median(column) * 1000 / parts for column in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {task.name} | {theirs:.2f} | {ours:.2f} | **{spread}** |"


def device_name(device: torch.device) -> str:
    """The GPU, or the processor's own words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name, default in (("hidden", 512), ("blocks", 8), ("rows", 1), ("length", 512), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it recommends kernels on every machine
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    theirs, ours = models(config(given.hidden, given.blocks), device, dtype)
    ids = torch.randint(1, 8192, (given.rows, given.length), device=device)
    expected, found = forward(theirs, ids), forward(ours, ids)
    error = float((found - expected).abs().max() / expected.abs().max())
    size = sum(p.numel() for p in theirs.parameters()) / 1e6
    print(f"{device_name(device)}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{size:.0f} M parameters, {given.dtype}, {given.rows} x {given.length} tokens, {given.rounds} rounds")
    print(f"largest relative difference of logits: {error:.1e}\n")
    print("| task | transformers, ms | ours, ms | times faster (range) |\n|---|---|---|---|")
    prompt = theirs, ids
    tasks = [
        Task("forward", partial(forward, *prompt), partial(forward, ours, ids)),
        Task("forward and backward", partial(train, *prompt), partial(train, ours, ids)),
        Task(
            "decoding",
            decode(theirs, ids, cache=partial(DynamicCache, config=theirs.config)),
            decode(ours, ids, cache=ours.new_cache),
        ),
    ]
    for task in tasks:
        print(measure(task, given.rounds, device), flush=True)
    ours.compute_mtp_in_eval = True
    print(measure(Task("forward, ours with one MTP depth", tasks[0].theirs, tasks[0].ours), given.rounds, device))


if __name__ == "__main__":
    main()
