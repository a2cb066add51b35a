"""Legacy checkpoints that are damaged, incomplete, hostile or put together from different runs are refused."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _kit import MEGATRON, Cli, convert
from _legacy import FILE, WIDE, State, edit, legacy, refused

from mtp_convert.checkpoint import open_checkpoint

NORM = "decoder.final_norm.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.2.mlp.experts.linear_fc1.weight0"


def rank(root: Path, name: str) -> Path:
    return root / "release" / name


def drop(name: str) -> Callable[[State], object]:
    return lambda s: s["model"].pop(name)


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], object]:
    def change(s: State) -> None:
        s["model"][name] = value(s["model"][name]).contiguous()

    return change


@pytest.mark.parametrize("gone", [("mp_rank_00_000",), ("mp_rank_01_001",), ("mp_rank_00_001", "mp_rank_01_000")])
def test_missing_ranks_are_all_named(gone: tuple[str, ...], tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2, pipeline=2)
    for name in gone:
        shutil.rmtree(rank(there, name))
    text = refused("MTP016", open_checkpoint, there)
    assert all(name in text for name in gone)


def test_a_rank_too_many(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    shutil.copytree(rank(there, "mp_rank_01"), rank(there, "mp_rank_02"))
    assert "tensor_model_parallel_size" in refused("MTP016", open_checkpoint, there)
    shutil.move(rank(there, "mp_rank_02"), rank(there, "mp_rank_01_000"))
    assert "mp_rank_01_000" in refused("MTP016", open_checkpoint, there)


def test_a_folder_without_its_file(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    (rank(there, "mp_rank_01") / FILE).unlink()
    assert f"mp_rank_01/{FILE}" in refused("MTP013", open_checkpoint, there)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_all_named(part: float, tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    for path in there.rglob(FILE):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    text = refused("MTP013", open_checkpoint, there)
    assert "mp_rank_00" in text
    assert "mp_rank_01" in text


def test_garbage_in_the_place_of_a_rank(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there")
    path = rank(there, "mp_rank_00") / FILE
    for content in (b"", b"PK\5\6" + b"\0" * 18, b"x" * 5000):
        path.write_bytes(content)
        refused("MTP013", open_checkpoint, there)
    torch.save([1, 2], path)
    assert "holds a list" in refused("MTP013", open_checkpoint, there)
    torch.save({"optimizer": {}}, path)
    assert "holds no model" in refused("MTP013", open_checkpoint, there)
    torch.save({"model": [torch.ones(2)]}, path)
    assert "the model is a list" in refused("MTP013", open_checkpoint, there)


class Hostile:
    """Pickles as a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["args", "optimizer", "model"])
def test_a_pickle_that_asks_for_code_is_not_run(where: str, tmp_path: Path) -> None:
    there, marker = legacy(tmp_path / "there", tensor=2), tmp_path / "marker"
    state = {"args": Namespace(), "model": {}, "iteration": 0}
    state[where] = {"x": Hostile(marker)}
    path = rank(there, "mp_rank_01") / FILE
    torch.save(state, path)
    assert ".mkdir'" in refused("MTP014", open_checkpoint, there)
    assert not marker.exists()
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("model_optim_rng/data.pkl"))  # it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QKV), f"{QKV} is not stored"),
        (put(QKV, lambda t: t[:8]), "expected F32 [32, 32]"),
        (put(QKV, lambda t: t.double()), "got F64"),
        (put(NORM, lambda t: t.bfloat16()), "got BF16"),
        (drop(FC1), f"{FC1} is not stored"),
    ],
    ids=["missing", "shape", "type", "type of a norm", "expert"],
)
def test_ranks_that_hold_different_things(change: Callable[[State], object], says: str, tmp_path: Path) -> None:
    there = edit(legacy(tmp_path / "there", tensor=2), change, "mp_rank_01")
    text = refused("MTP016", open_checkpoint, there)
    assert says in text
    assert "mp_rank_01" in text


@pytest.mark.parametrize(
    ("sizes", "name", "second"),
    [
        ({"tensor": 2}, NORM, "mp_rank_01"),
        ({"tensor": 2, "expert_tensor": 1}, FC1, "mp_rank_01"),
        ({"expert": 2}, QKV, "mp_rank_00_001"),
        ({"tensor": 2, "expert": 2}, QKV, "mp_rank_01_001"),
        ({"pipeline": 2}, "embedding.word_embeddings.weight", "mp_rank_00_001"),
    ],
    ids=str,
)
def test_ranks_that_hold_different_values(sizes: dict[str, int], name: str, second: str, tmp_path: Path) -> None:
    """Found before anything is written; looking at headers finds nothing wrong."""

    def change(s: State) -> None:
        s["model"][name].view(-1)[5] += 1

    there = edit(legacy(tmp_path / "there", **sizes), change, second)
    open_checkpoint(there)
    text = refused("MTP016", convert, there, tmp_path / "out", "hf")
    assert name in text
    assert "1 elements differ, first at 5" in text
    assert not (tmp_path / "out").exists()


def test_stages_that_hold_different_layers(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", pipeline=2, tensor=2)

    def change(s: State) -> None:
        s["model"] = {n: t for n, t in s["model"].items() if "layers.2." not in n}

    edit(there, change, "mp_rank_01_000")
    assert "decoder layers in mp_rank_01_000: got 2" in refused("MTP016", open_checkpoint, there)


def test_ranks_with_different_virtual_stages(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", pipeline=2, virtual=3)
    edit(there, lambda s: s.pop("model2"), "mp_rank_00_001")
    assert "model entries in mp_rank_00_001" in refused("MTP016", open_checkpoint, there)


def test_experts_that_the_ranks_do_not_divide(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", expert=2)
    shutil.copytree(rank(there, "mp_rank_00_001"), rank(there, "mp_rank_00_002"))
    edit(there, lambda s: s.update(args=Namespace(expert_model_parallel_size=3)))
    assert "a multiple of the expert parallel size 3" in refused("MTP016", open_checkpoint, there)


def test_padding_that_the_arguments_contradict(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    edit(there, lambda s: setattr(s["args"], "padded_vocab_size", 128))
    text = refused("MTP016", open_checkpoint, there)
    assert text.count("padded_vocab_size 128, expected 64") == 2  # the embedding and the output layer


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    edit(there, put("output_layer.weight", lambda t: t[:30]))
    edit(there, lambda s: s.update(args=Namespace()))
    assert "got [60, 32], expected [64, 32]" in refused("MTP024", open_checkpoint, there)


def test_a_config_of_another_model(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    config = (
        (there / "hf" / "config.json").read_text().replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 32')
    )
    (tmp_path / "config.json").write_text(config)
    text = refused("MTP024", open_checkpoint, there, hf_config=tmp_path / "config.json")
    assert "got [12, 32]" in text
    assert "expected [16, 32], 1/2 of [32, 32]" in text


def test_tensors_that_nobody_knows(tmp_path: Path) -> None:
    there = edit(legacy(tmp_path / "there", tensor=2), lambda s: s["model"].update(extra=torch.ones(3)))
    text = refused("MTP023", open_checkpoint, there)
    assert "model.extra in mp_rank_00" in text
    assert "model.extra in mp_rank_01" in text
    found = open_checkpoint(there, allow_unmapped=True)
    assert found.unmapped == ("model.extra in mp_rank_00", "model.extra in mp_rank_01")


def test_a_tensor_that_no_rank_has(tmp_path: Path) -> None:
    there = edit(legacy(tmp_path / "there", tensor=2), drop(QKV))
    assert QKV in refused("MTP022", open_checkpoint, there)


class TestSizesThatCannotBeWritten:
    """Options are refused before anything is read or written."""

    @pytest.mark.parametrize(
        ("sizes", "says"),
        [
            ({"tensor": 4}, ["num_query_groups", "mamba_num_groups"]),
            ({"expert": 3}, ["num_experts"]),
            ({"pipeline": 4}, ["num_layers"]),
            ({"tensor": 2, "expert_tensor": 4}, ["a divisor of the tensor parallel size 2"]),
            ({"virtual": 2}, ["more than one pipeline stage"]),
            ({"pipeline": 2, "virtual": 2}, ["virtual stages"]),
        ],
        ids=str,
    )
    def test_sizes(self, sizes: dict[str, int], says: list[str], tmp_path: Path) -> None:
        text = refused("MTP001", legacy, tmp_path / "there", **sizes)
        assert all(part in text for part in says)
        assert not (tmp_path / "there").exists()

    def test_an_unknown_container(self, tmp_path: Path) -> None:
        text = refused("MTP001", convert, WIDE, tmp_path / "there", "megatron", container="zip")
        assert "torch_dist, legacy" in text


def test_the_command_line_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    source = MEGATRON / "hyb_m"
    there = tmp_path / "there"
    shutil.copytree(source / "legacy_tp2", there)
    shutil.rmtree(there / "iter_0000001" / "mp_rank_00")
    got = cli("megatron-to-hf", there, tmp_path / "out", "--hf-config", source / "config.json")
    assert got.code == 3
    assert "MTP016" in got.err
    assert "mp_rank_00" in got.err
    assert "hint: copy the folders of all ranks" in got.err
    assert not (tmp_path / "out").exists()
