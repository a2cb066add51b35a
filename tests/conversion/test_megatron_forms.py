"""The same model as other Megatron runs store it: every form is read as the same params."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _dist import common, golden, read, scattered, whole, write
from _kit import (
    MEGATRON,
    Tensors,
    config_of,
    convert,
    files_of,
    golden_config,
    golden_tensors,
    hf_folder,
    there_and_back,
)
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip

NAME = "hyb_m"
CONFIG = MEGATRON / NAME / "config.json"
PAYLOAD = "model.safetensors"
SEPARATE = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
    ".mixer.in_proj.layer_norm_weight": ".norm.weight",
}


def separate_norms(name: str) -> str:
    for fused, separate in SEPARATE.items():
        name = name.replace(fused, separate)
    return name


SPELLINGS: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "transformer_layer": (
        lambda n: n.replace(".mtp_model_layer.", ".transformer_layer."),
        {"inner": "transformer_layer"},
    ),
    "model prefix": (lambda n: f"model.{n}", {"wrapper": "model."}),
    "module prefix": (lambda n: f"module.{n}", {"wrapper": "module."}),
    "separate norms": (separate_norms, {"attention_norm": "input_layernorm.weight", "mamba_norm": "norm.weight"}),
    "final_layernorm": (
        lambda n: n.replace("decoder.final_norm.", "decoder.final_layernorm."),
        {"final_norm": "final_layernorm"},
    ),
    "all of them": (
        lambda n: "module." + separate_norms(n).replace(".mtp_model_layer.", ".transformer_layer."),
        {"wrapper": "module.", "inner": "transformer_layer", "mlp_norm": "pre_mlp_layernorm.weight"},
    ),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The HF weights of megatron-core's own folder."""
    target = tmp_path_factory.mktemp("expected") / "hf"
    convert(MEGATRON / NAME / "ckpt", target, "hf", hf_config=CONFIG)
    return (target / PAYLOAD).read_bytes()


def to_hf(source: Path, scratch: Path) -> bytes:
    convert(source, scratch / "hf", "hf", hf_config=CONFIG)
    return (scratch / "hf" / PAYLOAD).read_bytes()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_is_read_and_comes_back(spelling: str, expected: bytes, tmp_path: Path) -> None:
    rename, words = SPELLINGS[spelling]
    source = write(tmp_path / "src", {rename(n): t for n, t in golden(NAME).items()})
    found = open_checkpoint(source, hf_config=CONFIG)
    assert words.items() <= found.layout.words.items()
    assert roundtrip(found, Options("hf")).ok
    assert to_hf(source, tmp_path) == expected


@pytest.mark.parametrize("seed", range(4))
def test_any_chunks_beside_a_training_state(seed: int, expected: bytes, tmp_path: Path) -> None:
    weights = golden(NAME)
    training: dict[str, Any] = {f"optimizer.state.exp_avg.{n}": torch.zeros_like(t) for n, t in weights.items()}
    training |= {"optimizer.param_groups/shard_0_1": [1], "rng_state/shard_0.0_1.1": [b"state"]}
    source = write(tmp_path / "src", {**training, **weights}, scattered(seed))
    found = open_checkpoint(source, hf_config=CONFIG)
    assert found.stored.training >= training.keys()
    assert not found.unmapped
    assert to_hf(source, tmp_path) == expected


def test_chunks_of_expert_and_tensor_ranks(expected: bytes, tmp_path: Path) -> None:
    """Expert stacks cut by expert ranks and rows, everything else by halves of its rows."""

    def cut(name: str, shape: torch.Size) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if shape[0] % 2:
            return whole(name, shape)
        half, rest = shape[0] // 2, tuple(shape[1:])
        return [((r * half, *(0,) * len(rest)), (half, *rest)) for r in (1, 0)]

    assert to_hf(write(tmp_path / "src", golden(NAME), cut), tmp_path) == expected


class TestCommonState:
    """Megatron's arguments say how often the one stored depth runs."""

    ARGS: dict[str, Any] = {"mtp_num_layers": 3, "mtp_use_repeated_layer": True}  # noqa: RUF012

    def test_common_pt(self, tmp_path: Path) -> None:
        source = write(tmp_path / "src", golden("hyb_rep"), args=self.ARGS)
        assert self.steps(source) == (3, True)

    def test_object(self, tmp_path: Path) -> None:
        state = {**golden("hyb_rep"), "common_state/shard_0_1": [common(self.ARGS)]}
        assert self.steps(write(tmp_path / "src", state)) == (3, True)

    def test_common_pt_is_preferred(self, tmp_path: Path) -> None:
        state = {**golden("hyb_rep"), "common_state/shard_0_1": [common({**self.ARGS, "mtp_num_layers": 2})]}
        assert self.steps(write(tmp_path / "src", state, args=self.ARGS)) == (3, True)

    def test_neither(self, tmp_path: Path) -> None:
        assert self.steps(write(tmp_path / "src", golden("hyb_rep"))) == (1, False)

    @staticmethod
    def steps(source: Path) -> tuple[int, bool]:
        found = open_checkpoint(source, hf_config=MEGATRON / "hyb_rep" / "config.json")
        return found.steps, found.repeated


def test_padding_rows_are_read_and_left_behind(expected: bytes, tmp_path: Path) -> None:
    weights = golden(NAME)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weights[name] = torch.cat([weights[name], torch.full((32, 32), 7.0)])
    source = write(tmp_path / "src", weights)
    assert to_hf(source, tmp_path) == expected
    notes = convert(source, tmp_path / "again", "hf", hf_config=CONFIG).notes
    assert sum("32 padding rows beyond vocab_size 96" in n for n in notes) == 2


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_padded_checkpoint_round_trips(value: float, tmp_path: Path) -> None:
    """Training leaves anything in the padding rows; they are no params and cannot come back."""
    weights = golden(NAME)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weights[name] = torch.cat([weights[name], torch.full((32, 32), value)])
    source = write(tmp_path / "src", weights, args={"mtp_num_layers": 2, "padded_vocab_size": 128})
    assert roundtrip(open_checkpoint(source, hf_config=CONFIG), Options("hf")).ok


def test_steps_of_a_repeated_layer_come_back(tmp_path: Path) -> None:
    args = {"mtp_num_layers": 3, "mtp_use_repeated_layer": True}
    source = write(tmp_path / "src", golden("hyb_rep"), args=args)
    convert(source, tmp_path / "hf", "hf", hf_config=MEGATRON / "hyb_rep" / "config.json")
    assert convert(tmp_path / "hf", tmp_path / "there", "megatron").steps == 3


def test_padding_rows_are_written_as_zeros_and_come_off(tmp_path: Path) -> None:
    weights = golden_tensors("nemotron_d1")
    source = hf_folder(tmp_path / "src", weights, golden_config("nemotron_d1"))
    there, back = there_and_back(source, tmp_path, padding=40, parallel={"tensor": 2})
    found, rows = read(there / "release"), weights["lm_head.weight"].shape[0]
    names = {"embedding.word_embeddings.weight": "backbone.embeddings.weight", "output_layer.weight": "lm_head.weight"}
    for name, own in names.items():
        assert found[name].shape == (80, 32)
        assert torch.equal(found[name][:rows], weights[own])
        assert not found[name][rows:].any()
    args: Any = open_checkpoint(there).stored.arguments["args"]
    assert (args["vocab_size"], args["padded_vocab_size"], args["make_vocab_size_divisible_by"]) == (64, 80, 40)
    assert files_of(back) == files_of(source)


def homogeneous(scratch: Path, pattern: str) -> Path:
    """A random HF model of equal layers, with the shapes of the golden ones."""
    kinds = {"M": "linear_attention", "*": "full_attention"}
    given, found = golden_tensors("nemotron_d1"), Tensors()
    own = {"M": "backbone.layers.0.", "*": "backbone.layers.1."}[pattern[0]]
    made = torch.Generator().manual_seed(5)
    for name, t in given.items():
        if name.startswith(own):
            for i in range(len(pattern)):
                values = t + 0.1 * torch.randn(t.shape, generator=made)
                found[f"backbone.layers.{i}.{name.removeprefix(own)}"] = values
        elif not name.startswith("backbone.layers."):
            found[name] = t
    words = {"layers_block_type": [kinds[c] for c in pattern]}
    return hf_folder(scratch / "src", found, golden_config("nemotron_d1", **words))


@pytest.mark.parametrize("pattern", ["MM", "**", "***"])
def test_stacked_layers(pattern: str, tmp_path: Path) -> None:
    """Equal layers as one tensor: what torch stacks from the per-layer form, both ways."""
    source = homogeneous(tmp_path, pattern)
    there, back = there_and_back(source, tmp_path, words={"decoder": "stacked"})
    assert files_of(back) == files_of(source)
    convert(source, tmp_path / "layers", "megatron")
    single = read(tmp_path / "layers" / "release")
    stacked = {n: t for n, t in single.items() if not n.startswith("decoder.layers.")}
    for name in (n for n in single if n.startswith("decoder.layers.0.")):
        rows = [single[name.replace(".0.", f".{i}.", 1)] for i in range(len(pattern))]
        stacked[name.replace(".0.", ".", 1)] = torch.stack(rows)
    found = read(there / "release")
    assert found.keys() == stacked.keys()
    assert all(torch.equal(found[n], t) for n, t in stacked.items())
    again = write(tmp_path / "torch", stacked, scattered(1))
    convert(again, tmp_path / "hf", "hf", hf_config=source / "config.json")
    given, returned = load_file(source / PAYLOAD), load_file(tmp_path / "hf" / PAYLOAD)
    assert given.keys() == returned.keys()
    assert all(torch.equal(returned[n], t) for n, t in given.items())


def test_config_folder_brings_its_side_files(tmp_path: Path) -> None:
    """--hf-config DIR: the tokenizer travels, weights and checkpoints below it do not."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_bytes(CONFIG.read_bytes())
    (config / "tokenizer.json").write_text("{}")
    convert(MEGATRON / NAME / "ckpt", tmp_path / "hf", "hf", hf_config=config)
    assert files_of(tmp_path / "hf").keys() == {"config.json", "tokenizer.json", PAYLOAD}
    assert config_of(tmp_path / "hf") == config_of(config)
