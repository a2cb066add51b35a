"""Megatron checkpoints whose tensors have one shard per rank: `singleton_local_shards`, and what its FSDP stores."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _dist import RELEASE, common, golden, read, scattered, single_process, write
from _fsdp import RANKS, distributed_save
from _kit import MEGATRON, Cli, Tensors, convert, files_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.multiprocessing.spawn import spawn

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.options import Options
from mtp_convert.roundtrip import roundtrip

GATED = {"dsv3_te": True, "qwen2_te": True, "hyb_latent": False}
STACK = re.compile(r"decoder\.layers\.(?=[a-z])")


def config(name: str) -> Path:
    return MEGATRON / name / "config.json"


def by_layer(weights: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Stacked decoder layers one by one."""
    for name, tensor in weights.items():
        if STACK.match(name):
            yield from ((STACK.sub(f"decoder.layers.{i}.", name), t) for i, t in enumerate(tensor))
        else:
            yield name, tensor


def experts_apart(weights: Tensors, name: str) -> Iterator[tuple[str, Tensor]]:
    """Stacked experts one by one: `name` is what the module of expert e is called."""
    for key, tensor in by_layer(weights):
        if ".experts.experts." in key:
            yield from ((key.replace("experts.experts.", name.format(e=e)), t) for e, t in enumerate(tensor))
        else:
            yield key, tensor


def halves(weights: Iterator[tuple[str, Tensor]], gated: bool) -> Tensors:
    """The first matrix of a gated MLP as two."""
    found = Tensors()
    for name, tensor in weights:
        if gated and ".linear_fc1.weight" in name:
            gate, up = tensor.chunk(2)
            found |= {f"{name}_w": gate.clone(), f"{name}_v": up.clone()}
        else:
            found[name] = tensor.clone()
    return found


def single(name: str) -> Tensors:
    """The golden weights as megatron-core 0.19 stores them with `singleton_local_shards`."""
    return halves(experts_apart(golden(name), "experts.experts.{e}."), GATED[name])


def of_state_dict(name: str, *, gated: bool = True) -> Tensors:
    """The same under the names of `state_dict`, where grouped experts number their weights."""
    numbered = experts_apart(golden(name), "experts.#{e}#")
    plain = ((re.sub(r"#(\d+)#(.*weight)", r"\2\1", n), t) for n, t in numbered)
    return halves(((n.replace("transformer_layer", "mtp_model_layer"), t) for n, t in plain), gated)


@pytest.fixture(scope="module", params=GATED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(name: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The HF weights of megatron-core's own folder."""
    target = tmp_path_factory.mktemp("expected") / "hf"
    convert(MEGATRON / name / "ckpt", target, "hf", hf_config=config(name))
    return (target / "model.safetensors").read_bytes()


class TestSingleton:
    def test_is_read(self, name: str, expected: bytes, tmp_path: Path) -> None:
        source = write(tmp_path / "src", single(name), scattered(3))
        found = open_checkpoint(source, hf_config=config(name))
        assert found.layout.words["shards"] == "single"
        assert not found.unmapped
        convert(source, tmp_path / "hf", "hf", hf_config=config(name))
        assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected

    def test_comes_back(self, name: str, tmp_path: Path) -> None:
        source = write(tmp_path / "src", single(name))
        assert roundtrip(open_checkpoint(source, hf_config=config(name)), Options("hf")).ok

    def test_is_written(self, name: str, tmp_path: Path) -> None:
        """And its readers are told, because they derive the keys from that."""
        convert(MEGATRON / name / "ckpt", tmp_path / "hf", "hf", hf_config=config(name))
        words = {"shards": "single", "decoder": "per_layer"}
        convert(tmp_path / "hf", tmp_path / "there", "megatron", words=words)
        found, wanted = read(tmp_path / "there" / RELEASE), single(name)
        assert found.keys() == wanted.keys()
        assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []
        arguments = open_checkpoint(tmp_path / "there").stored.arguments
        content = arguments["content_metadata"]
        assert isinstance(content, dict)
        assert content["singleton_local_shards"] is True


class TestFsdp:
    """Written by torch alone: no metadata.json, no common state, names of `state_dict` behind `model.module.`"""

    NAME = "dsv3_te"

    def write(self, root: Path, weights: Tensors, **more: Any) -> Path:  # noqa: ANN401
        """As `torch.distributed.checkpoint.save` flattens what Megatron hands it."""
        folder = root / "iter_0000001"
        folder.mkdir(parents=True)
        state = {
            "model": {f"module.{n}": t for n, t in weights.items()},
            "checkpoint_version": 3.0,
            "iteration": 1,
            "optimizer": {"state": {f"module.module.module.{n}": {"exp_avg": t} for n, t in weights.items()}},
            "opt_param_scheduler": {"max_lr": 0.1},
            **more,
        }
        with single_process():
            save(state, storage_writer=FileSystemWriter(folder, sync_files=False), no_dist=True)
        (root / "latest_checkpointed_iteration.txt").write_text("1")
        return root

    def test_is_read(self, tmp_path: Path) -> None:
        args = Namespace(mtp_num_layers=1, params_dtype=torch.float32, use_megatron_fsdp=True)
        source = self.write(tmp_path / "src", of_state_dict(self.NAME), args=args)
        found = open_checkpoint(source, hf_config=config(self.NAME))
        assert found.stored.container == "dcp"
        assert not found.unmapped
        assert len(found.stored.training) > 100
        arguments: Any = found.stored.arguments["args"]
        assert arguments["use_megatron_fsdp"] is True
        self.equals(source, tmp_path)

    def test_is_read_without_arguments(self, tmp_path: Path) -> None:
        """As Megatron-Bridge writes it."""
        self.equals(self.write(tmp_path / "src", of_state_dict(self.NAME)), tmp_path)

    def test_whole_matrices_and_states(self, tmp_path: Path) -> None:
        """`torch_dcp`: a state of a module is a tensor or None there, and no weight."""
        weights = of_state_dict(self.NAME, gated=False)
        states: dict[str, Any] = {
            "decoder.layers.0.mlp.linear_fc1._extra_state": torch.empty(0, dtype=torch.uint8),
            "decoder.layers.0.mlp.linear_fc2._extra_state": None,
        }
        source = self.write(tmp_path / "src", Tensors({**weights, **states}))
        found = open_checkpoint(source, hf_config=config(self.NAME))
        assert found.layout.words["shards"] == "whole"
        assert {n for n in found.stored.objects if "_extra_state" in n} == {f"model.module.{n}" for n in states}
        self.equals(source, tmp_path)

    def test_shards_of_two_processes(self, tmp_path: Path) -> None:
        save_file(of_state_dict(self.NAME), tmp_path / "weights.safetensors")
        folder = tmp_path / "src" / "iter_0000001"
        spawn(distributed_save, (tmp_path / "weights.safetensors", folder), nprocs=RANKS)  # type: ignore[no-untyped-call]
        (tmp_path / "src" / "latest_checkpointed_iteration.txt").write_text("1")
        found = open_checkpoint(tmp_path / "src", hf_config=config(self.NAME))
        chunks = {n: len(t.chunks) for n, t in found.stored.tensors.items()}
        assert len(found.stored.files) == RANKS
        assert {n for n, k in chunks.items() if k == 1} == {n for n in chunks if n.endswith("expert_bias")}
        self.equals(tmp_path / "src", tmp_path)

    def equals(self, source: Path, scratch: Path) -> None:
        convert(source, scratch / "hf", "hf", hf_config=config(self.NAME))
        convert(MEGATRON / self.NAME / "ckpt", scratch / "expected", "hf", hf_config=config(self.NAME))
        found, wanted = (load_file(scratch / p / "model.safetensors") for p in ("hf", "expected"))
        assert found.keys() == wanted.keys()
        assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []
        convert(scratch / "hf", scratch / "there", "megatron")
        again = files_of(scratch / "there")
        assert f"{RELEASE}/metadata.json" in again

    def test_the_way_back_is_refused(self, tmp_path: Path, cli: Cli) -> None:
        source = self.write(tmp_path / "src", of_state_dict(self.NAME))
        done = cli("roundtrip", source, "--hf-config", config(self.NAME))
        assert done.code == 4
        assert "dcp" in done.err
        assert "diff" in done.err

    def test_experts_are_listed_as_one(self, tmp_path: Path, cli: Cli) -> None:
        source = self.write(tmp_path / "src", of_state_dict(self.NAME))
        done = cli("inspect", source, "--hf-config", config(self.NAME))
        assert "linear_fc1.weight{0..3}_w" in done.out.replace("…", "")
        assert "weight0_w" not in done.out


def test_common_state_wins_over_a_stray_object(tmp_path: Path) -> None:
    """`args` is read where nothing else says the arguments."""
    state = {**golden("qwen2_te"), "args": Namespace(mtp_num_layers=9)}
    source = write(tmp_path / "src", state, args=vars(common({"mtp_num_layers": 2})["args"]))
    arguments: Any = open_checkpoint(source, hf_config=config("qwen2_te")).stored.arguments["args"]
    assert arguments["mtp_num_layers"] == 2
