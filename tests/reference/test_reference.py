"""The real megatron-core reads what we wrote and computes the same; we read what it writes at other parallel sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from _kit import AUTOMODEL, TINY, convert
from _megatron import Megatron, install
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import diff
from mtp_convert.verify.forward import relative_error

pytestmark = pytest.mark.reference
TOLERANCE = 2e-4  # float32; what is seen is 2e-6, a wrong mapping gives 0.3 and more


def _megatron(version: str) -> Megatron:
    try:
        return install(version)
    except FileNotFoundError as error:
        if os.environ.get("MTP_CONVERT_REQUIRE_REFERENCE"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def megatron() -> Megatron:
    return _megatron("0.19.2")


@pytest.fixture(scope="session")
def older() -> Megatron:
    return _megatron("0.16.1")


@pytest.mark.parametrize("name", ["nemotron_d1", "nemotron_d2_rep", "nemotron_mtpM"])
def test_loads_strictly_and_computes_the_same(name: str, megatron: Megatron, tmp_path: Path) -> None:
    source = AUTOMODEL / name
    expected = load_file(source / "io.safetensors")
    depths = sum(key.startswith("mtp_per_depth_h.") for key in expected)
    convert(source, tmp_path / "there", "megatron")
    repeated = ["--mtp-num-layers", depths, "--repeated"] if name.endswith("_rep") else []
    out = tmp_path / "out.safetensors"
    config, tokens = source / "config.json", source / "io.safetensors"
    megatron.run(
        "run_hybrid.py",
        "--hf-config",
        config,
        "--load",
        tmp_path / "there",
        "--tokens",
        tokens,
        "--out",
        out,
        *repeated,
    )
    found = load_file(out)
    errors = {"logits": relative_error(found["logits"], expected["logits"])}
    for k in range(depths):
        errors[f"depth {k}"] = relative_error(found[f"hidden_mtp{k}"], expected[f"mtp_per_depth_h.{k}"])
    print(name, errors)
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("source", [AUTOMODEL / "nemotron_packed", AUTOMODEL / "nemotron_latent_groups", TINY])
def test_loads_strictly(source: Path, megatron: Megatron, tmp_path: Path) -> None:
    """Outputs of these are not comparable or not recorded: a packed row, another group rule, a trained fixture."""
    convert(source, tmp_path / "there", "megatron")
    said = megatron.run("run_hybrid.py", "--hf-config", source / "config.json", "--load", tmp_path / "there")
    assert "strict=raise_all, mismatch none" in said


@pytest.mark.parametrize("size", ["tp", "pp", "ep"])
def test_reads_what_megatron_writes_at_other_sizes(size: str, megatron: Megatron, tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_mtpM"
    convert(source, tmp_path / "there", "megatron")
    resaved = tmp_path / "resaved"
    config = source / "config.json"
    megatron.resave(size, "--hf-config", config, "--load", tmp_path / "there", "--resave", resaved)
    assert len(list(resaved.glob("iter_*/*.distcp"))) > 1
    convert(resaved, tmp_path / "back", "hf", hf_config=config)
    found = diff(open_checkpoint(source), open_checkpoint(tmp_path / "back"))
    assert found.equal
    assert not found.dtypes


def test_an_older_release_reads_the_same_numbers(older: Megatron, megatron: Megatron, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "there", "megatron", megatron_version="0.18")
    seen = {}
    for release in (older, megatron):
        out = tmp_path / f"{release.version}.safetensors"
        common = json.loads(release.run("plain_load.py", tmp_path / "there", out).splitlines()[-1])
        assert "hybrid_layer_pattern" in common["args"]
        seen[release.version] = load_file(out)
    a, b = seen.values()
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)
