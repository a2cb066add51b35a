"""DeepSeek-V3 and V4: golden Megatron checkpoints become what transformers runs, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, MEGATRON, Cli, config_of, convert, differing, hf_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import diff
from mtp_convert.errors import ConvertError
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip
from mtp_convert.verify.forward import predict, relative_error

GOLDEN = ["dsv3_te", "dsv4_dev"]
WEIGHTS = "model.safetensors"


def to_hf(name: str, scratch: Path) -> Path:
    source = MEGATRON / name
    convert(source / "ckpt", scratch / "hf", "hf", hf_config=source / "config.json")
    return scratch / "hf"


@pytest.mark.parametrize("name", GOLDEN)
def test_transformers_finds_every_tensor(name: str, tmp_path: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(to_hf(name, tmp_path), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # transformers leaves MTP weights out without a word; where its rule for that knows only released sizes, it says so
    assert all(".layers.4." in key for key in info["unexpected_keys"])


@torch.no_grad()
def test_deepseek_v3_computes_what_megatron_computed(tmp_path: Path) -> None:
    outputs = load_file(MEGATRON / "dsv3_te" / "out.safetensors")
    model = AutoModelForCausalLM.from_pretrained(to_hf("dsv3_te", tmp_path), dtype=torch.float32)
    assert relative_error(model(outputs["tokens"]).logits, outputs["logits"]) < 1e-5


@torch.no_grad()
def test_deepseek_v3_is_the_same_model_in_megatron_again(tmp_path: Path) -> None:
    """The tree that Megatron's names and arguments build, on what came back from Hugging Face, MTP included."""
    outputs = load_file(MEGATRON / "dsv3_te" / "out.safetensors")
    convert(to_hf("dsv3_te", tmp_path), tmp_path / "megatron", "megatron")
    found = predict(open_checkpoint(tmp_path / "megatron").stored, outputs["tokens"])
    assert relative_error(found.logits, outputs["logits"]) < 1e-5
    assert relative_error(found.mtp_hidden[0], outputs["hidden_mtp0"]) < 1e-5
    assert relative_error(found.mtp_logits[0], outputs["logits_mtp0"]) < 1e-5


@pytest.mark.parametrize("via", ["megatron", "native"])
@pytest.mark.parametrize("name", GOLDEN)
def test_roundtrip(name: str, via: str, tmp_path: Path) -> None:
    found = roundtrip(open_checkpoint(to_hf(name, tmp_path)), Options(via))
    assert found.ok
    assert found.same_files


@pytest.mark.parametrize("name", GOLDEN)
def test_megatron_comes_back(name: str, tmp_path: Path) -> None:
    source = MEGATRON / name
    convert(to_hf(name, tmp_path), tmp_path / "megatron", "megatron")
    ours, golden = open_checkpoint(tmp_path / "megatron"), open_checkpoint(source / "ckpt", hf_config=source)
    assert diff(ours, golden).equal
    assert ours.stored.tensors.keys() == golden.stored.tensors.keys()
    assert ours.stored.objects == golden.stored.objects


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    """transformers has spellings of its own for DeepSeek-V4, and drops MTP."""
    source = AUTOMODEL / "dsv4_d1"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    assert open_checkpoint(tmp_path / "saved").layout.words["kv_norm"] == "norm"
    convert(tmp_path / "saved", tmp_path / "megatron", "megatron")
    (tmp_path / "megatron" / "mtp_convert.json").unlink()
    convert(tmp_path / "megatron", tmp_path / "released", "hf")
    released = {n: t for n, t in load_file(source / WEIGHTS).items() if not n.startswith("mtp.")}
    assert_equal(load_file(tmp_path / "released" / WEIGHTS), released)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize("stored", [True, False])
def test_copies_of_an_mtp_depth_are_compared_and_come_back(stored: bool, tmp_path: Path) -> None:
    """Flash-Base stores embedding and head again in its MTP depth; the other releases do not."""
    source = AUTOMODEL / "dsv4_d1"
    tensors = load_file(source / WEIGHTS)
    if stored:
        tensors["mtp.0.emb.tok_emb.weight"] = tensors["embed.weight"].clone()
        tensors["mtp.0.head.weight"] = tensors["head.weight"].clone()
    hf_folder(tmp_path / "hf", tensors, config_of(source))
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    assert differing(tmp_path / "hf", tmp_path / "back") == []


def test_a_copy_that_is_none_is_refused(tmp_path: Path, cli: Cli) -> None:
    source = AUTOMODEL / "dsv4_d1"
    tensors = load_file(source / WEIGHTS)
    tensors["mtp.0.head.weight"] = tensors["head.weight"] + 1
    folder = hf_folder(tmp_path / "hf", tensors, config_of(source))
    done = cli("hf-to-megatron", folder, tmp_path / "out")
    assert done.code == 4
    assert "mtp.0.head.weight" in done.err
    done = cli("hf-to-megatron", folder, tmp_path / "out", "--copies", "use-main")
    assert done.code == 0
    assert "mtp.0.head.weight" in done.out
    convert(tmp_path / "out", tmp_path / "back", "hf")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert torch.equal(back["mtp.0.head.weight"], back["head.weight"])


@pytest.mark.parametrize("sign", ["config", "tensor"])
def test_a_drafter_of_another_kind_is_refused_by_name(sign: str, tmp_path: Path) -> None:
    source = AUTOMODEL / "dsv4_d1"
    tensors, config = load_file(source / WEIGHTS), config_of(source)
    if sign == "config":
        config["dspark_block_size"] = 4
    else:
        tensors["mtp.0.main_norm.weight"] = torch.ones(32)
    with pytest.raises(ConvertError, match="DSpark"):
        open_checkpoint(hf_folder(tmp_path / "hf", tensors, config))


def test_token_tables_keep_their_integers(tmp_path: Path) -> None:
    source = AUTOMODEL / "dsv4_d1"
    convert(source, tmp_path / "megatron", "megatron", dtype="bf16")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    back = load_file(tmp_path / "back" / WEIGHTS)
    table = "layers.0.ffn.gate.tid2eid"
    assert torch.equal(back[table], load_file(source / WEIGHTS)[table])
    kept = {n for n, t in back.items() if t.dtype == torch.float32}
    assert "mtp.0.attn.attn_sink" in kept
    assert "layers.1.hc_ffn_scale" in kept
    assert back["layers.1.attn.wq_a.weight"].dtype == torch.bfloat16
