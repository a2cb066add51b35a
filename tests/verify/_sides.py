"""Tiny checkpoints in two layouts, and sides of them that run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from _families import CONFIGS, random_folder
from _kit import AUTOMODEL, TINY, convert
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.verify.side import Side, Tap, open_side
from mtp_convert.verify.taps import Forced, Halves, Recorder

CPU = torch.device("cpu")
SOURCES = {TINY.name: TINY, **{p.name: p for p in sorted(AUTOMODEL.iterdir())}}


def source(name: str, scratch: Path) -> Path:
    """A Hugging Face folder: a family's random one, or a folder of the repository."""
    return random_folder(name, scratch / "hf") if name in CONFIGS else SOURCES[name]


def both(name: str, scratch: Path, **options: object) -> tuple[Side, Side]:
    """A folder and its conversion to Megatron."""
    folder = source(name, scratch)
    convert(folder, scratch / "megatron", "megatron", **options)
    return side(folder), side(scratch / "megatron")


def side(folder: Path, hf_config: Path | None = None) -> Side:
    """The side of a checkpoint."""
    return open_side(open_checkpoint(folder, hf_config=hf_config))


def repeated(folder: Path, steps: int) -> Side:
    """The side of a folder whose one MTP depth runs several times."""
    return open_side(replace(open_checkpoint(folder), steps=steps, repeated=True))


def token_ids(rows: int = 2, length: int = 16) -> Tensor:
    """Ids below every tiny vocabulary."""
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def watched(
    what: Side,
    tap: Tap,
    *,
    ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    streamed: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Run a side on the CPU."""
    what.run(token_ids() if ids is None else ids, tap, dtype=dtype, device=CPU, streamed=streamed, only=only)


def recorded(what: Side, *, dtype: torch.dtype = torch.float32, streamed: bool = False) -> Recorder:
    """Inputs and outputs of every place."""
    tap = Recorder()
    watched(what, tap, dtype=dtype, streamed=streamed)
    return tap


def from_same_inputs(a: Side, b: Side) -> dict[str, float]:
    """Relative error of every place of b on a's inputs, with rows beside them that run freely."""
    first = recorded(a)
    tap, ids = Halves(first.inputs), token_ids()
    watched(b, tap, ids=torch.cat([ids, ids]))
    return {place: error(tap.forced[place], value) for place, value in first.outputs.items()}


def forced(what: Side, inputs: dict[str, Tensor], only: Collection[str]) -> dict[str, Tensor]:
    """Outputs of some places alone, on known inputs."""
    tap = Forced(inputs)
    watched(what, tap, streamed=True, only=only)
    return tap.outputs


def error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`."""
    return float((a - b).abs().max() / b.abs().max())
