"""Legacy checkpoints against the real megatron-core: every rank's file holds what it would store, and it loads ours."""

from __future__ import annotations

import argparse
import os
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import torch
from _kit import AUTOMODEL, convert
from _megatron import Megatron, install

from mtp_convert.checkpoint import open_checkpoint

pytestmark = pytest.mark.reference
SOURCE = AUTOMODEL / "nemotron_mtpM"
FILE = "model_optim_rng.pt"


@pytest.fixture(scope="module")
def megatron() -> Megatron:
    try:
        return install("0.19.2")
    except FileNotFoundError as error:
        if os.environ.get("MTP_CONVERT_REQUIRE_REFERENCE"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def torch_dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torch_dist") / "there"
    convert(SOURCE, root, "megatron")
    return root


def state(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def same(ours: object, theirs: object) -> bool:
    if theirs is None or ours is None:
        return ours is theirs
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({}, ""),
        ({"tp": 2}, ""),
        ({"pp": 2}, ""),
        ({"ep": 2}, ""),
        ({"tp": 2, "ep": 2, "etp": 1}, ""),
        ({"pp": 2, "vpp": 3}, ""),
        ({"pp": 2}, "Et|t*5mmL"),
        ({"tp": 2, "pp": 2}, ""),
    ],
    ids=str,
)
def test_every_rank_holds_what_megatron_would_store(
    sizes: dict[str, int], layout: str, megatron: Megatron, torch_dist: Path, tmp_path: Path
) -> None:
    names = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "etp": "expert_tensor", "vpp": "virtual"}
    parallel = {names[size]: n for size, n in sizes.items()}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert(SOURCE, ours, "megatron", container="legacy", parallel=parallel, pipeline_layout=layout)
    args = open_checkpoint(ours).stored.arguments["args"]
    assert isinstance(args, dict)
    tp, pp, ep = (sizes.get(size, 1) for size in ("tp", "pp", "ep"))
    given = [word for size, n in sizes.items() for word in (f"--{size}", n)]
    said = megatron.run_ranks(
        lcm(tp, sizes.get("etp", tp) * ep) * pp,
        "run_legacy.py",
        *("--hf-config", SOURCE / "config.json", "--load", torch_dist, "--save", theirs),
        *("--check", ours / "release", "--pattern", args["hybrid_layer_pattern"], *given),
    )
    assert "loaded strictly" in said
    files = sorted(p.parent.name for p in theirs.rglob(FILE))
    assert sorted(p.parent.name for p in (ours / "release").rglob(FILE)) == files
    for rank in files:
        a, b = state(ours / "release" / rank / FILE), state(theirs / rank / FILE)
        models = [key for key in b if key.startswith("model")]
        assert [key for key in a if key.startswith("model")] == models
        for key in models:
            assert a[key].keys() == b[key].keys()
            assert [n for n in b[key] if not same(a[key][n], b[key][n])] == []
