"""Legacy checkpoints as torch sees them, and the means to change them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import AUTOMODEL, convert, golden_config, golden_tensors, hf_folder

from mtp_convert.errors import ConvertError

FILE = "model_optim_rng.pt"
WIDE = AUTOMODEL / "nemotron_mtpM"  # 6 layers, 8 experts, 2 query groups, 2 depths of 4 blocks
State = dict[str, Any]


def load(path: Path) -> State:
    """A rank's state, as Megatron-LM loads it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: State = torch.load(path, map_location="cpu", weights_only=True)
    return found


def states(root: Path, iteration: str = "release") -> dict[str, State]:
    """Every rank's state by the name of its folder."""
    return {p.parent.name: load(p) for p in sorted((root / iteration).glob(f"mp_rank_*/{FILE}"))}


def same_model(ours: State, theirs: State) -> None:
    """Two ranks hold the same models: names, types, shapes, bits; and the same `_extra_state`."""
    models = [key for key in theirs if key.startswith("model")]
    assert [key for key in ours if key.startswith("model")] == models
    for key in models:
        assert ours[key].keys() == theirs[key].keys()
        for name, value in theirs[key].items():
            mine = ours[key][name]
            if value is None:
                assert mine is None, name
            else:
                assert (mine.dtype, mine.shape) == (value.dtype, value.shape), name
                assert torch.equal(mine, value), name


def edit(root: Path, change: Callable[[State], object], rank: str = "") -> Path:
    """Save the state of a rank (of all of them) again, changed."""
    for path in sorted(root.rglob(FILE)):
        if rank in ("", path.parent.name):
            state = load(path)
            change(state)
            torch.save(state, path)
    return root


def legacy(root: Path, source: Path = WIDE, **sizes: int) -> Path:
    """A source as a legacy checkpoint."""
    convert(source, root, "megatron", container="legacy", parallel=sizes)
    return root


def with_vocabulary(folder: Path, rows: int, *, tied: bool = False) -> Path:
    """A golden model with fewer tokens, or without an output layer of its own."""
    tensors = dict(golden_tensors("nemotron_d1"))
    for name, tensor in tensors.items():
        if tensor.shape[0] == 64 and ("embed" in name or "lm_head" in name):
            tensors[name] = tensor[:rows].contiguous()
    if tied:
        del tensors["lm_head.weight"]
    return hf_folder(folder, tensors, golden_config("nemotron_d1", vocab_size=rows, tie_word_embeddings=tied))


def refused(code: str, act: Callable[..., object], *args: object, **kwargs: object) -> str:
    """The text of all problems of a refusal."""
    with pytest.raises(ConvertError) as caught:
        act(*args, **kwargs)
    text = "\n".join(p.line() for p in caught.value.problems)
    assert caught.value.code == code, text
    return text
