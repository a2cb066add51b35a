"""Repeated layers: equal depths become one stored depth and come apart again, in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _dist import read
from _kit import AUTOMODEL, Tensors, config_of, convert, differing, files_of, golden_tensors, hf_folder
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.verify.forward import relative_error, run_hf, run_megatron

ONE = AUTOMODEL / "nemotron_d1"
TWO = AUTOMODEL / "nemotron_mtpM"
PATTERN = 4  # sub-layers per depth of TWO


def bf16(scratch: Path) -> Path:
    """TWO in a type where a mean has to be rounded."""
    tensors = {n: t.bfloat16() for n, t in golden_tensors(TWO.name).items()}
    return hf_folder(scratch / "bf16", tensors, config_of(TWO))


def args_of(folder: Path) -> dict[str, Any]:
    args = open_checkpoint(folder).stored.arguments["args"]
    assert isinstance(args, dict)
    return args


@pytest.mark.parametrize("source", [ONE, AUTOMODEL / "nemotron_d2_rep"], ids=lambda p: p.name)
def test_hf_unfold_then_fold_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    many = convert(source, tmp_path / "many", "hf", depths=3)
    assert (many.physical, many.steps, many.repeated) == (3, 3, False)
    assert config_of(tmp_path / "many")["num_nextn_predict_layers"] == 3
    one = convert(tmp_path / "many", tmp_path / "one", "hf", depths=1)
    assert (one.physical, one.steps, one.repeated) == (1, 3, True)
    assert config_of(tmp_path / "one") == config_of(source)
    payload = "model.safetensors"
    given, found = load_file(source / payload), load_file(tmp_path / "one" / payload)
    assert given.keys() == found.keys()
    assert all(torch.equal(t, found[n]) for n, t in given.items())


def test_hf_unfold_then_fold_gives_the_same_bytes(tmp_path: Path) -> None:
    convert(ONE, tmp_path / "many", "hf", depths=3)
    convert(tmp_path / "many", tmp_path / "one", "hf", depths=1)
    assert "model.safetensors" not in differing(ONE, tmp_path / "one")


def test_megatron_unfold_then_fold_gives_the_same_bytes(tmp_path: Path) -> None:
    convert(ONE, tmp_path / "given", "megatron")
    many = convert(tmp_path / "given", tmp_path / "many", "megatron", depths=3)
    assert (many.physical, many.steps, many.repeated) == (3, 3, False)
    assert args_of(tmp_path / "many")["hybrid_layer_pattern"] == "M*E-ME/*E/*E/*E"
    one = convert(tmp_path / "many", tmp_path / "one", "megatron", depths=1)
    assert (one.physical, one.steps, one.repeated) == (1, 3, True)
    args = args_of(tmp_path / "one")
    assert (args["mtp_num_layers"], args["mtp_use_repeated_layer"]) == (3, True)
    for file in ("release/__0_0.distcp", "release/.metadata"):
        assert files_of(tmp_path / "one")[file] == files_of(tmp_path / "given")[file]


def test_unfolded_depths_compute_what_the_repeated_one_does(tmp_path: Path) -> None:
    convert(ONE, tmp_path / "many", "hf", depths=3)
    convert(tmp_path / "many", tmp_path / "there", "megatron", depths=1)
    ids = load_file(ONE / "io.safetensors")["input_ids"]
    wanted = run_hf(ONE, ids, steps=3)
    for out in (run_hf(tmp_path / "many", ids), run_megatron(open_checkpoint(tmp_path / "there").stored, ids)):
        assert len(out.mtp_logits) == 3
        errors = [relative_error(a, b) for a, b in zip(out.mtp_logits, wanted.mtp_logits, strict=True)]
        assert max(errors) < 2e-4


@pytest.mark.parametrize("layout", ["hf", "megatron"])
def test_unequal_depths_are_refused(layout: str, tmp_path: Path) -> None:
    source = TWO
    if layout == "megatron":
        convert(TWO, tmp_path / "src", "megatron")
        source = tmp_path / "src"
    with pytest.raises(ConvertError) as caught:
        convert(source, tmp_path / "one", layout, depths=1)
    assert (caught.value.code, caught.value.exit_code) == ("MTP027", 4)
    given = golden_tensors(TWO.name)
    names = {
        "hf": ("mtp.layers.4.enorm.weight", "mtp.layers.0.enorm.weight"),
        "megatron": ("mtp.layers.1.enorm.weight", "mtp.layers.0.enorm.weight"),
    }[layout]
    gap = (given["mtp.layers.4.enorm.weight"] - given["mtp.layers.0.enorm.weight"]).abs().max().item()
    line = caught.value.problems[0].line()
    assert line.startswith(f"{names[0]} is not {names[1]}: ")
    assert f"max difference {gap:.3g}" in line
    assert "--force-fold" in caught.value.hint
    assert not (tmp_path / "one").exists()


class TestForce:
    """Unequal depths, when the user says what the one depth should be."""

    @staticmethod
    def pairs(given: Tensors, found: Tensors) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        rows = []
        for name in (n for n in found if n.startswith("mtp.")):
            head, layers, f, rest = name.split(".", 3)
            rows.append((name, found[name], given[name], given[f"{head}.{layers}.{int(f) + PATTERN}.{rest}"]))
        return rows

    @pytest.mark.parametrize("type_", ["fp32", "bf16"])
    def test_mean(self, type_: str, tmp_path: Path) -> None:
        source = TWO if type_ == "fp32" else bf16(tmp_path)
        convert(source, tmp_path / "one", "hf", depths=1, force_fold="mean")
        found = load_file(tmp_path / "one" / "model.safetensors")
        given = load_file(source / "model.safetensors")
        for name, mean, a, b in self.pairs(given, found):
            assert torch.equal(mean, torch.stack([a.double(), b.double()]).mean(0).to(a.dtype)), name
        assert all(torch.equal(t, given[n]) for n, t in found.items() if not n.startswith("mtp."))
        assert config_of(tmp_path / "one")["num_nextn_predict_layers"] == 1

    def test_first(self, tmp_path: Path) -> None:
        convert(TWO, tmp_path / "one", "hf", depths=1, force_fold="first")
        found = load_file(tmp_path / "one" / "model.safetensors")
        given = golden_tensors(TWO.name)
        assert found.keys() == {n for n in given if not n.startswith(tuple(f"mtp.layers.{f}." for f in range(4, 8)))}
        assert all(torch.equal(t, given[n]) for n, t in found.items())

    @pytest.mark.parametrize("force", ["mean", "first"])
    def test_both_layouts_agree(self, force: str, tmp_path: Path) -> None:
        source = bf16(tmp_path)
        convert(source, tmp_path / "hf", "hf", depths=1, force_fold=force)
        convert(tmp_path / "hf", tmp_path / "a", "megatron")
        convert(source, tmp_path / "megatron", "megatron")
        convert(tmp_path / "megatron", tmp_path / "b", "megatron", depths=1, force_fold=force)
        a, b = read(tmp_path / "a" / "release"), read(tmp_path / "b" / "release")
        assert a.keys() == b.keys()
        assert all(torch.equal(t, b[n]) for n, t in a.items())

    def test_two_depths_cannot_become_three(self, tmp_path: Path) -> None:
        with pytest.raises(ConvertError) as caught:
            convert(TWO, tmp_path / "many", "hf", depths=3)
        assert caught.value.code == "MTP028"
