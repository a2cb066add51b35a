"""Native module trees as a layout: our own trees and NeMo AutoModel's state dict, from every layout and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, Cli, Tensors, config_of, convert, differing, hf_folder
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip

NAMES = sorted(p.parent.name for p in AUTOMODEL.glob("*/native.safetensors"))
WEIGHTS = "model.safetensors"


def unequal(a: Tensors, b: Tensors) -> list[str]:
    """Names that are not on both sides with the same type, shape and bits."""
    return sorted(
        n
        for n in a.keys() | b.keys()
        if n not in a or n not in b or a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])
    )


@pytest.mark.parametrize("name", NAMES)
def test_automodel_variant_is_what_automodel_holds(name: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / name, tmp_path / "native", "native", variant="automodel")
    written = load_file(tmp_path / "native" / WEIGHTS)
    assert unequal(written, load_file(AUTOMODEL / name / "native.safetensors")) == []


@pytest.mark.parametrize("name", NAMES)
def test_automodels_state_dict_becomes_the_released_form(name: str, tmp_path: Path) -> None:
    source = AUTOMODEL / name
    bare = tmp_path / "bare" / WEIGHTS
    bare.parent.mkdir()
    shutil.copyfile(source / "native.safetensors", bare)
    convert(bare, tmp_path / "hf", "hf", hf_config=source / "config.json")
    assert unequal(load_file(tmp_path / "hf" / WEIGHTS), load_file(source / WEIGHTS)) == []


@pytest.mark.parametrize("variant", ["", "automodel"])
@pytest.mark.parametrize("name", NAMES)
def test_every_file_comes_back(name: str, variant: str, tmp_path: Path) -> None:
    convert(AUTOMODEL / name, tmp_path / "native", "native", variant=variant)
    assert open_checkpoint(tmp_path / "native").layout.name == "native"
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert differing(AUTOMODEL / name, tmp_path / "hf") == []


@pytest.mark.parametrize("name", NAMES)
def test_native_through_megatron(name: str, tmp_path: Path) -> None:
    source = AUTOMODEL / name
    convert(source, tmp_path / "native", "native", variant="automodel")
    convert(tmp_path / "native", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "again", "native")
    assert unequal(load_file(tmp_path / "again" / WEIGHTS), load_file(source / "native.safetensors")) == []


def test_roundtrip_via_native() -> None:
    assert roundtrip(open_checkpoint(AUTOMODEL / "nemotron_d1"), Options("native", variant="automodel")).ok


def test_state_space_params_are_widened_and_come_back(tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_d1"
    half = {n: t.bfloat16() for n, t in load_file(source / WEIGHTS).items()}
    hf_folder(tmp_path / "hf", half, config_of(source))
    convert(tmp_path / "hf", tmp_path / "native", "native", variant="automodel")
    wide = {n for n, t in load_file(tmp_path / "native" / WEIGHTS).items() if t.dtype == torch.float32}
    kept = ("A_log", "D", "dt_bias", "e_score_correction_bias")
    assert wide == {n for n in load_file(source / "native.safetensors") if n.endswith(kept)}
    assert wide
    convert(tmp_path / "native", tmp_path / "back", "hf")
    assert unequal(load_file(tmp_path / "back" / WEIGHTS), half) == []


def test_an_ambiguous_tree_is_what_the_command_says(tmp_path: Path, cli: Cli) -> None:
    """Without experts, our tree and one released spelling have the same names."""
    source = AUTOMODEL / "nemotron_d1"
    config = config_of(source) | {"num_nextn_predict_layers": 0}
    kept = [i for i, kind in enumerate(config["layers_block_type"]) if kind != "moe"]
    config["layers_block_type"] = [config["layers_block_type"][i] for i in kept]
    config["num_hidden_layers"] = len(kept)
    tensors = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        head, _, rest = name.partition("backbone.layers.")
        index, _, leaf = rest.partition(".")
        if rest and int(index) in kept:
            tensors[f"{head}backbone.layers.{kept.index(int(index))}.{leaf}"] = tensor
        elif not rest and not name.startswith("mtp."):
            tensors[name] = tensor
    hf_folder(tmp_path / "dense", tensors, config)
    convert(tmp_path / "dense", tmp_path / "native", "native")
    (tmp_path / "native" / "mtp_convert.json").unlink()
    assert open_checkpoint(tmp_path / "native").layout.name == "hf"
    assert cli("native-to-hf", tmp_path / "native", tmp_path / "hf").code == 0
    assert load_file(tmp_path / "hf" / WEIGHTS).keys() == tensors.keys()


def test_another_layout_than_the_command_names(tmp_path: Path, cli: Cli) -> None:
    done = cli("native-to-hf", AUTOMODEL / "nemotron_d1", tmp_path / "no")
    assert done.code == 2
    assert "MTP003" in done.err
    assert not (tmp_path / "no").exists()


def test_unknown_variant() -> None:
    with pytest.raises(ConvertError, match=r"got nemo, expected automodel, automodel-0\.5"):
        roundtrip(open_checkpoint(AUTOMODEL / "nemotron_d1"), Options("native", variant="nemo"))
