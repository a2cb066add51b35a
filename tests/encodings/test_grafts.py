"""MTP heads of encoded checkpoints: codes, scales and the scales of activations go where their weights go."""

from __future__ import annotations

from pathlib import Path

import torch
from _coded import same_bits
from _kit import AUTOMODEL, Cli, config_of, hf_folder
from _releases import FP8, modelopt, of_format
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"


def release(folder: Path) -> Path:
    """FP8 everywhere, with a scale of activations beside two weights of the decoder and one of the heads."""
    source, _ = of_format(folder, "fp8_block")
    raw = load_file(source / WEIGHTS)
    heads = [n for n in raw if n.endswith("_proj.weight") and n.startswith("mtp.") and n + "_scale_inv" in raw]
    decoder = [n for n in raw if n.endswith("_proj.weight") and not n.startswith("mtp.") and n + "_scale_inv" in raw]
    for i, name in enumerate((*decoder[:2], heads[0])):
        raw[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5 + i)
    config = config_of(source)
    (source / WEIGHTS).unlink()
    (source / "config.json").unlink()
    source.rmdir()
    return hf_folder(source, raw, config)


def equal(a: Path, b: Path) -> None:
    found, wanted = load_file(b / WEIGHTS), load_file(a / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not same_bits(found[n], t)] == []


def test_off_out_and_on_again(tmp_path: Path, cli: Cli) -> None:
    source = release(tmp_path / "src")
    assert cli("drop", source, tmp_path / "base").code == 0
    assert cli("extract", source, tmp_path / "heads").code == 0
    assert sum(n.endswith("input_scale") for n in load_file(tmp_path / "heads" / WEIGHTS)) == 1
    done = cli("graft", tmp_path / "base", tmp_path / "heads", tmp_path / "out")
    assert done.code == 0, done.err
    equal(source, tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"] == FP8


def test_scales_of_a_cache_stay_with_their_layers(tmp_path: Path, cli: Cli) -> None:
    source, _ = modelopt(tmp_path / "src")
    heads = {n for n in load_file(source / WEIGHTS) if n.startswith("mtp.")}
    assert any(n.endswith("k_scale") for n in heads)
    assert cli("drop", source, tmp_path / "base").code == 0
    assert cli("extract", source, tmp_path / "heads").code == 0
    assert cli("graft", tmp_path / "base", tmp_path / "heads", tmp_path / "out").code == 0
    equal(source, tmp_path / "out")


def test_codes_on_a_base_of_values_are_refused(tmp_path: Path, cli: Cli) -> None:
    """One config cannot describe both."""
    source = release(tmp_path / "src")
    assert cli("extract", source, tmp_path / "heads", "--without-ends").code == 0
    done = cli("graft", AUTOMODEL / "nemotron_d1", tmp_path / "heads", tmp_path / "out")
    assert done.code == 4
    assert "quantisation: method" in done.err
    assert "--encoding bf16" in done.err
    assert not (tmp_path / "out").exists()


def test_new_heads_of_an_encoded_model(tmp_path: Path, cli: Cli) -> None:
    """They begin as codes of the last layer, with its scales."""
    source = release(tmp_path / "src")
    assert cli("drop", source, tmp_path / "base").code == 0
    done = cli("init", tmp_path / "base", tmp_path / "out")
    assert done.code == 0, done.err
    made = load_file(tmp_path / "out" / WEIGHTS)
    codes = {n for n in made if n.startswith("mtp.") and n.endswith("_scale_inv")}
    assert codes
    assert all(made[n.removesuffix("_scale_inv")].dtype == torch.float8_e4m3fn for n in codes)
    assert cli("inspect", tmp_path / "out", "--format", "json").data["mtp_stored_depths"] == 1
