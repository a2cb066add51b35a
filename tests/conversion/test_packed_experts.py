"""Legacy checkpoints of Megatron-Core's GroupedMLP (until 0.16): all experts of a rank in two transposed tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from _kit import MEGATRON, Cli, convert, files_of, hf_folder
from _legacy import State, edit, legacy, refused
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint

EXPERT = re.compile(r"(.*\.mlp\.experts)\.linear_fc([12])\.weight(\d+)")


def pack(state: State) -> None:
    """What GroupedMLP views as [experts, hidden, -1] (weight1) and [experts, -1, hidden] (weight2), both transposed."""
    for key in [k for k in state if k.startswith("model")]:
        found: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
        model = state[key]
        for name in list(model):
            if match := EXPERT.fullmatch(name):
                found[match[1], match[2]][int(match[3])] = model.pop(name)
            elif re.search(r"\.mlp\.experts\.linear_fc[12]\._extra_state", name):
                del model[name]
        for (module, number), experts in found.items():
            stacked = torch.stack([experts[e].T for e in range(len(experts))])
            shape = (stacked.shape[1], -1) if number == "1" else (-1, stacked.shape[2])
            model[f"{module}.weight{number}"] = stacked.contiguous().view(shape)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with gated experts, in the Hugging Face layout."""
    golden = MEGATRON / "dsv3_te"
    folder = tmp_path_factory.mktemp("gated") / "hf"
    convert(golden / "ckpt", folder, "hf", hf_config=golden / "config.json")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose experts are not gated."""
    golden = MEGATRON / "hyb_m"
    folder = tmp_path_factory.mktemp("plain") / "hf"
    convert(golden / "ckpt", folder, "hf", hf_config=golden / "config.json")
    return folder


def same(source: Path, packed: Path, scratch: Path) -> None:
    convert(packed, scratch / "back", "hf")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (scratch / "back", source))
    assert found.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("sizes", [{}, {"expert": 2}, {"pipeline": 2}, {"tensor": 2, "expert_tensor": 1, "expert": 2}])
def test_gated(gated: Path, sizes: dict[str, int], tmp_path: Path) -> None:
    packed = edit(legacy(tmp_path / "src", gated, **sizes), pack)
    assert open_checkpoint(packed).layout.words["experts"] == "packed"
    same(gated, packed, tmp_path)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"expert": 2}])
def test_not_gated(plain: Path, sizes: dict[str, int], tmp_path: Path) -> None:
    """Their shares of tensor ranks are runs of bytes as well."""
    same(plain, edit(legacy(tmp_path / "src", plain, **sizes), pack), tmp_path)


def test_shares_that_are_no_runs_are_refused(gated: Path, tmp_path: Path) -> None:
    """Gate and up of a tensor rank lie side by side in every row."""
    packed = edit(legacy(tmp_path / "src", gated, tensor=2), pack)
    assert "packed with other experts and cut over 2 ranks" in refused("MTP024", open_checkpoint, packed)


def test_they_are_written_as_released(gated: Path, tmp_path: Path) -> None:
    packed = edit(legacy(tmp_path / "src", gated), pack)
    convert(packed, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "megatron", container="legacy")
    assert files_of(tmp_path / "again").keys() == files_of(legacy(tmp_path / "plain", gated)).keys()
    assert open_checkpoint(tmp_path / "again").layout.words["experts"] == "grouped"


def test_the_way_back_is_refused(gated: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("roundtrip", edit(legacy(tmp_path / "src", gated), pack))
    assert done.code == 4
    assert "packed, which is read and not written" in done.err


def test_a_wrong_number_of_experts_is_no_guess(gated: Path, tmp_path: Path) -> None:
    """A config with other experts than the files hold."""
    source = hf_folder(tmp_path / "hf", load_file(gated / "model.safetensors"), (gated / "config.json").read_text())
    packed = edit(legacy(tmp_path / "src", source), pack)
    config = packed / "hf" / "config.json"
    config.write_text(config.read_text().replace('"n_routed_experts": 4', '"n_routed_experts": 8'))
    refused("MTP024", open_checkpoint, packed)
