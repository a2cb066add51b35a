"""Time of the forward passes of `verify` against plain forward passes of transformers, in paired runs.

    python benchmarks/verify.py --hidden 512 --layers 12 --length 128 --rounds 7

A random DeepSeek-V3 with one MTP depth is written and converted to Megatron. A pair is one plain forward pass of
transformers' own model, already in memory, without its MTP depth, and one run of the judge over both checkpoints: four
passes' worth of rows with every MTP depth, one of them in another precision, reading and converting the weights
included. Streamed and whole are measured in pairs too. All in alternating order; the ratios say how many times longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from native_forward import device_name, timed
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.utils import logging

from mtp_convert.adapters.deepseek_v3 import FAMILY
from mtp_convert.checkpoint import Checkpoint, open_checkpoint
from mtp_convert.convert import prepare, run
from mtp_convert.options import Options
from mtp_convert.verify.inputs import token_ids
from mtp_convert.verify.judge import Conditions, judge
from mtp_convert.verify.side import open_side

VOCABULARY = 8192
Runs = Callable[[], object]


def config(hidden: int, layers: int) -> dict[str, Any]:
    """A config.json in the released proportions at another size."""
    found = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=hidden // 4,
        kv_lora_rank=hidden // 4,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        dtype="bfloat16",
    )
    return {**found.to_dict(), "architectures": ["DeepseekV3ForCausalLM"], "num_nextn_predict_layers": 1}


def write_source(folder: Path, settings: dict[str, Any]) -> None:
    """A Hugging Face folder of random bfloat16 weights, MTP included."""
    layout = FAMILY.layout("hf", FAMILY.dims(settings, settings["num_nextn_predict_layers"]))
    torch.manual_seed(0)
    tensors = {}
    for b in layout.bindings.values():
        values = torch.randn(b.shape) / b.shape[-1] ** 0.5 if len(b.shape) > 1 else 1 + 0.2 * torch.randn(b.shape)
        tensors[b.tensor] = values if b.high_precision else values.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], object]:
    """A plain forward pass of transformers' model, in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # in evaluation mode
    torch.nn.Module.to(model, device)

    @torch.no_grad()
    def forward(ids: Tensor) -> object:
        return model(ids, use_cache=False).logits

    return forward


def judged(a: Checkpoint, b: Checkpoint, ids: Tensor, conditions: Conditions) -> None:
    """What the forward level of `verify` does; models are built anew, as by a command."""
    verdict = judge(open_side(a), open_side(b), ids, conditions)
    if bad := [p.place for p in verdict.places if not p.ok]:
        raise SystemExit(f"not the same: {', '.join(bad)}")


def paired(runs: tuple[Runs, Runs], rounds: int, device: torch.device) -> list[tuple[float, float]]:
    """Seconds of both, in alternating order, after one run each that does not count."""
    for run_once in runs:
        timed(run_once, device)
    found = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {i: timed(runs[i], device) for i in order}
        found.append((seconds[0], seconds[1]))
    return found


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    """Medians in seconds, and the range of the paired ratios."""
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {first:.2f} | {second:.2f} | **{spread}** |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name, default in (("hidden", 512), ("layers", 12), ("rows", 2), ("length", 128), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it reports MTP weights that it does not load
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    ids = token_ids(given.rows, given.length, VOCABULARY).to(device)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "hf"), Path(scratch, "megatron")
        write_source(source, config(given.hidden, given.layers))
        run(prepare(open_checkpoint(source), Options("megatron")), target)
        a, b = open_checkpoint(source), open_checkpoint(target)
        print(f"{device_name(device)}; torch {torch.__version__}, transformers {transformers.__version__}")
        size = f"{a.stored.nbytes / 1e6:.0f} MB of bfloat16, {given.dtype}"
        print(f"{size}, {given.rows} x {given.length} tokens, {given.rounds} rounds")
        plain = partial(load(source, device, dtype), ids)
        whole, streamed = (partial(judged, a, b, ids, Conditions(dtype, device, s)) for s in (False, True))
        tasks: dict[str, tuple[Runs, Runs]] = {
            "a plain forward pass, verify": (plain, whole),
            "load and a plain forward pass, verify": (lambda: load(source, device, dtype)(ids), whole),
            "verify, verify streamed": (whole, streamed),
        }
        print("\n| first, second | first, s | second, s | second over first (range) |\n|---|---|---|---|")
        for name, runs in tasks.items():
            print(row(name, paired(runs, given.rounds, device)), flush=True)


if __name__ == "__main__":
    main()
