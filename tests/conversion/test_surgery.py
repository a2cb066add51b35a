"""MTP heads taken off, out, on, and made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, FIXTURES, MEGATRON, Cli, config_of, convert, hf_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtp_convert import adapters
from mtp_convert.verify.forward import relative_error, run_hf

WEIGHTS = "model.safetensors"
NAMES = ["nemotron_d1", "deepseek_v3", "dsv4_d1"]


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one MTP depth, of each kind of layout."""
    if request.param != "deepseek_v3":
        return AUTOMODEL / str(request.param)
    folder = tmp_path_factory.mktemp("v3") / "hf"
    golden = MEGATRON / "dsv3_te"
    convert(golden / "ckpt", folder, "hf", hf_config=golden / "config.json")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def is_head(name: str) -> bool:
    return name.startswith(("mtp.", "model.layers.4."))


def test_off(source: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("drop", source, tmp_path / "out").code == 0
    assert tensors(tmp_path / "out").keys() == {n for n in tensors(source) if not is_head(n)}
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("ends", [True, False])
def test_out_and_on_again(source: Path, ends: bool, tmp_path: Path, cli: Cli) -> None:
    assert cli("drop", source, tmp_path / "base").code == 0
    flag = "--with-ends" if ends else "--without-ends"
    assert cli("extract", source, tmp_path / "heads", flag).code == 0
    heads = tensors(tmp_path / "heads")
    assert {n for n in heads if is_head(n)} == {n for n in tensors(source) if is_head(n)}
    assert len({n for n in heads if not is_head(n)}) == (2 if ends else 0)
    assert cli("graft", tmp_path / "base", tmp_path / "heads", tmp_path / "out").code == 0
    a, b = tensors(source), tensors(tmp_path / "out")
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_heads_of_another_base_are_refused(tmp_path: Path, cli: Cli) -> None:
    source = AUTOMODEL / "nemotron_d1"
    changed = tensors(source)
    changed["lm_head.weight"] = changed["lm_head.weight"] * 2
    other = hf_folder(tmp_path / "other", changed, config_of(source))
    assert cli("extract", other, tmp_path / "heads").code == 0
    done = cli("graft", source, tmp_path / "heads", tmp_path / "out")
    assert done.code == 4
    assert "lm_head.weight" in done.err
    assert not (tmp_path / "out").exists()


def test_heads_of_another_family_are_refused(tmp_path: Path, cli: Cli) -> None:
    done = cli("graft", AUTOMODEL / "nemotron_d1", AUTOMODEL / "dsv4_d1", tmp_path / "out")
    assert done.code == 4
    assert "family" in done.err


def test_heads_that_are_there_are_replaced(tmp_path: Path, cli: Cli) -> None:
    """nemotron_d1 gets the depth of another checkpoint of its shape."""
    source = AUTOMODEL / "nemotron_d1"
    changed = {n: t + is_head(n) * 0.5 for n, t in tensors(source).items()}
    other = hf_folder(tmp_path / "other", changed, config_of(source))
    assert cli("graft", source, other, tmp_path / "out").code == 0
    assert all(torch.equal(t, changed[n]) for n, t in tensors(tmp_path / "out").items())


@torch.no_grad()
def test_new_heads_start_as_the_last_layer_once_more(tmp_path: Path, cli: Cli) -> None:
    golden = MEGATRON / "dsv3_te"
    convert(golden / "ckpt", tmp_path / "hf", "hf", hf_config=golden / "config.json")
    assert cli("drop", tmp_path / "hf", tmp_path / "base").code == 0
    assert cli("init", tmp_path / "base", tmp_path / "out", "--depths", 2).code == 0
    made = tensors(tmp_path / "out")
    leaf = "self_attn.q_b_proj.weight"
    assert torch.equal(made[f"model.layers.5.{leaf}"], made[f"model.layers.3.{leaf}"])
    assert torch.equal(made["model.layers.4.eh_proj.weight"], torch.cat([torch.zeros(32, 32), torch.eye(32)], 1))
    ids = torch.arange(16).view(1, 16)
    out = run_hf(tmp_path / "out", ids)
    assert len(out.mtp_logits) == 2
    assert out.mtp_logits[0].isfinite().all()
    assert relative_error(out.logits, run_hf(tmp_path / "base", ids).logits) < 1e-5


def test_new_heads_for_every_family(source: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("drop", source, tmp_path / "base").code == 0
    assert cli("init", tmp_path / "base", tmp_path / "out").code == 0
    assert tensors(tmp_path / "out").keys() == tensors(source).keys()
    assert cli("inspect", tmp_path / "out", "--format", "json").data["mtp_stored_depths"] == 1


def test_heads_beside_heads_are_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("init", AUTOMODEL / "nemotron_d1", tmp_path / "out")
    assert done.code == 4
    assert "drop" in done.err


def test_a_depth_of_unknown_make_is_refused(cli: Cli, tmp_path: Path) -> None:
    config = {k: v for k, v in config_of(AUTOMODEL / "nemotron_d1").items() if not k.startswith("mtp_")}
    plain = {n: t for n, t in tensors(AUTOMODEL / "nemotron_d1").items() if not is_head(n)}
    folder = hf_folder(tmp_path / "hf", plain, json.loads(json.dumps(config | {"num_nextn_predict_layers": 0})))
    done = cli("init", folder, tmp_path / "out")
    assert done.code == 4
    assert "mtp_hybrid_override_pattern" in done.err


@pytest.mark.parametrize("name", ["inkling", "glm5_next", "minimax_m3", "qwen4_exp", "mimo"])
def test_out_and_on_again_wherever_the_sizes_are(name: str, tmp_path: Path, cli: Cli) -> None:
    """Configs that keep their sizes in a section; heads without the model's ends."""
    source = random_folder(name, tmp_path / "src")
    heads = tmp_path / "heads"
    assert cli("drop", source, tmp_path / "base").code == 0
    assert cli("extract", source, heads, "--without-ends").code == 0
    done = cli("graft", tmp_path / "base", heads, tmp_path / "out")
    assert done.code == 0, done.err
    a, b = tensors(source), tensors(tmp_path / "out")
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def random_folder(name: str, folder: Path) -> Path:
    """Random weights of a family's example config."""
    config = json.loads((FIXTURES / "configs" / f"{name}.json").read_text())
    family, section = adapters.find(config)
    model = config[section[0]] if section else config
    dims = family.dims(model, max(family.depths.declared(model), 1))
    made = torch.Generator().manual_seed(0)
    words = family.nested if section else {}
    bindings = family.layout("hf", dims, words).bindings
    return hf_folder(folder, {n: torch.randn(b.shape, generator=made) for n, b in bindings.items()}, config)


def test_heads_of_another_width_are_refused(tmp_path: Path, cli: Cli) -> None:
    golden = MEGATRON / "dsv3_te"
    convert(golden / "ckpt", tmp_path / "wide", "hf", hf_config=golden / "config.json")
    source = random_folder("deepseek_v3", tmp_path / "narrow")
    config = {**config_of(source), "hidden_size": 16}
    family, _ = adapters.find(config)
    bindings = family.layout("hf", family.dims(config, 1)).bindings
    narrow = hf_folder(tmp_path / "other", {n: torch.zeros(b.shape) for n, b in bindings.items()}, config)
    assert cli("extract", narrow, tmp_path / "heads", "--without-ends").code == 0
    assert cli("drop", tmp_path / "wide", tmp_path / "base").code == 0
    done = cli("graft", tmp_path / "base", tmp_path / "heads", tmp_path / "out")
    assert done.code == 4
    assert "hidden size: got 16, expected 32" in done.err
