"""Live modules: filled from any layout, written to any layout, whole and sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, MEGATRON, convert
from _sharded import RANKS, work
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing import spawn
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_convert.errors import ConvertError
from mtp_convert.live import iter_tensors, load_into, save_from
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.hybrid_model import HybridModel
from mtp_convert.verify.forward import relative_error

NEMOTRON, V4 = AUTOMODEL / "nemotron_d1", AUTOMODEL / "dsv4_d1"
WEIGHTS = "model.safetensors"


def megatron_tree(config: Path, dtype: torch.dtype = torch.float32) -> HybridModel | GPTModel:
    settings = TransformerConfig.from_hf_config(json.loads(config.read_text()), params_dtype=dtype)
    return (GPTModel if settings.hybrid is None else HybridModel)(settings).eval()


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden DeepSeek-V3 as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("v3") / "hf"
    golden = MEGATRON / "dsv3_te"
    convert(golden / "ckpt", folder, "hf", hf_config=golden / "config.json")
    return folder


@torch.no_grad()
def test_a_megatron_tree_takes_a_released_folder(v3: Path) -> None:
    outputs = load_file(MEGATRON / "dsv3_te" / "out.safetensors")
    model = megatron_tree(v3 / "config.json")
    assert load_into(model, v3).layout == "megatron"
    found = model.predict(outputs["tokens"])
    assert relative_error(found.logits, outputs["logits"]) < 1e-5
    assert relative_error(found.mtp_logits[0], outputs["logits_mtp0"]) < 1e-5


def test_and_gives_it_back(v3: Path, tmp_path: Path) -> None:
    model = megatron_tree(v3 / "config.json")
    load_into(model, v3)
    save_from(model, tmp_path / "out", hf_config=v3)
    assert unequal(load_file(tmp_path / "out" / WEIGHTS), load_file(v3 / WEIGHTS)) == []


@torch.no_grad()
def test_a_hybrid_tree_with_mamba() -> None:
    io = load_file(NEMOTRON / "io.safetensors")
    model = megatron_tree(NEMOTRON / "config.json")
    load_into(model, NEMOTRON)
    found = model.predict(io["input_ids"])
    assert relative_error(found.logits, io["logits"]) < 1e-5
    assert relative_error(found.mtp_hidden[0], io["mtp_per_depth_h.0"]) < 1e-5
    named = dict(iter_tensors(model, hf_config=NEMOTRON))
    assert unequal(named, load_file(NEMOTRON / WEIGHTS)) == []


def test_values_become_the_modules_types(v3: Path) -> None:
    model = megatron_tree(v3 / "config.json", torch.bfloat16)
    load_into(model, v3)
    stored = load_file(v3 / WEIGHTS)
    assert torch.equal(model.state_dict()["output_layer.weight"], stored["lm_head.weight"].bfloat16())


def test_transformers_own_model_is_the_native_layout_without_mtp(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NEMOTRON))
    assert load_into(model, NEMOTRON).layout == "native"
    released = {n: t for n, t in load_file(NEMOTRON / WEIGHTS).items() if not n.startswith("mtp.")}
    save_from(model, tmp_path / "out", hf_config=NEMOTRON)
    assert unequal(load_file(tmp_path / "out" / WEIGHTS), released) == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("layout", ["hf", "native", "megatron"])
def test_iterating_over_a_checkpoint_gives_what_a_conversion_writes(layout: str, tmp_path: Path) -> None:
    convert(V4, tmp_path / "hf", "hf")
    named = dict(iter_tensors(V4, to=layout))
    if layout == "megatron":
        model_names = named.keys()
        assert "mtp.layers.0.e_proj.weight" in model_names
        return
    convert(V4, tmp_path / "out", layout)
    assert unequal(named, load_file(tmp_path / "out" / WEIGHTS)) == []


def test_a_variant_while_iterating() -> None:
    named = dict(iter_tensors(V4, to="native", variant="automodel"))
    assert unequal(named, load_file(V4 / "native.safetensors")) == []


def test_memory_with_gaps_is_filled_in_place() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NEMOTRON))
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(torch.zeros(weight.shape[1], weight.shape[0]).T)
    load_into(model, NEMOTRON)
    assert torch.equal(model.lm_head.weight, load_file(NEMOTRON / WEIGHTS)["lm_head.weight"])


def test_another_model_is_refused_and_left_alone(v3: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NEMOTRON))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConvertError):
        load_into(model, v3)
    assert unequal(before, dict(model.state_dict())) == []


def test_a_module_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no config"):
        save_from(nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_ranks_that_share_a_module(tmp_path: Path) -> None:
    spawn(work, (NEMOTRON, tmp_path), nprocs=RANKS)
    released = {n: t for n, t in load_file(NEMOTRON / WEIGHTS).items() if not n.startswith("mtp.")}
    for rank in range(RANKS):
        assert unequal(load_file(tmp_path / f"rank{rank}.safetensors"), released) == []
    assert unequal(load_file(tmp_path / "hf" / WEIGHTS), released) == []
