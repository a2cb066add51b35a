"""Sound torch_dist folders: what Megatron and torch wrote is found to the last bit."""

import shutil
from pathlib import Path

import pytest
import torch
from _dist_build import TENSORS, edit, load, loaded, place, replace_item, same, save, saved, set_fields
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mtp_convert.containers import torch_dist
from mtp_convert.encodings.dtype import DTYPES

GOLDEN = sorted((Path(__file__).parents[2] / "fixtures" / "golden" / "megatron").glob("*/ckpt/iter_*"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.parents[1].name)
def test_megatron_checkpoints_equal_what_torch_reads(folder: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    like = {
        n: torch.empty(m.size, dtype=m.properties.dtype)
        for n, m in described.items()
        if isinstance(m, TensorStorageMetadata) and not n.startswith(torch_dist.TRAINING_STATE)
    }
    stored = torch_dist.read(folder)
    assert stored.tensors.keys() == like.keys()
    for name, tensor in load(folder, like).items():
        assert same(loaded(stored.tensors[name]), tensor), name
    others = {n for n, m in described.items() if not isinstance(m, TensorStorageMetadata)}
    assert stored.objects | stored.training == others
    assert stored.arguments["iteration"] == 1


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (4, 0), (5, 3), (2, 1, 3, 2)], ids=str)
def test_every_element_type_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {}
    for dtype in DTYPES:
        n = torch.Size(shape).numel() * dtype.itemsize
        raw = (torch.arange(n) % (2 if dtype.name == "BOOL" else 120)).to(torch.uint8)
        tensors[dtype.name] = raw.view(dtype.torch()).reshape(shape)
    stored = torch_dist.read(save(tmp_path / "c", tensors))
    assert stored.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded(stored.tensors[name]), tensor), name


def test_an_optimizer_is_no_weight(tmp_path: Path) -> None:
    stored = torch_dist.read(save(tmp_path, {**TENSORS, "optimizer.state.exp_avg.a": torch.ones(3)}))
    assert stored.tensors.keys() == TENSORS.keys()
    assert stored.training == {"optimizer.state.exp_avg.a"}


@pytest.mark.parametrize("storage", ["view", "view at an offset"])
def test_a_view_of_a_bigger_storage(tmp_path: Path, storage: str) -> None:
    big = torch.arange(100, dtype=torch.float32)
    tensor = (big[:12] if storage == "view" else big[40:52]).reshape(3, 4)
    stored = torch_dist.read(replace_item(save(tmp_path), "a", saved(tensor)))
    assert same(loaded(stored.tensors["a"]), tensor)


def test_a_parameter_is_a_tensor(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(torch.randn(3, 4))
    assert same(loaded(torch_dist.read(replace_item(save(tmp_path), "a", saved(tensor))).tensors["a"]), tensor)


def test_chunks_in_two_files(tmp_path: Path) -> None:
    """Two ranks hold a half each; joined by hand, as torch does when several processes save."""
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    folder = save(tmp_path, {"a": whole})
    halves = [saved(whole[:, :2].clone()), saved(whole[:, 2:].clone())]
    (folder / "__0_0.distcp").write_bytes(b"xx" + halves[0])
    (folder / "__1_0.distcp").write_bytes(halves[1])

    def split(meta: object) -> None:
        (index, info) = next(iter(meta.storage_data.items()))
        chunk = type(meta.state_dict_metadata["a"].chunks[0])
        boxes = [((0, 0), (4, 2)), ((0, 2), (4, 4))]
        meta.state_dict_metadata["a"].chunks = [chunk(torch.Size(o), torch.Size(s)) for o, s in boxes]
        files = [("__0_0.distcp", 2, len(halves[0])), ("__1_0.distcp", 0, len(halves[1]))]
        meta.storage_data = {
            type(index)("a", torch.Size(o), i): type(info)(*file)
            for i, ((o, _), file) in enumerate(zip(boxes, files, strict=True))
        }

    stored = torch_dist.read(edit(folder, split))
    assert same(loaded(stored.tensors["a"]), whole)
    assert [f.name for f in stored.files] == ["__0_0.distcp", "__1_0.distcp"]


def test_common_state_is_read_from_its_file_first(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN[0], tmp_path / "c")
    stored_in_object = torch_dist.read(folder).arguments
    assert stored_in_object["iteration"] == 1
    from argparse import Namespace

    torch.save({"args": Namespace(hidden_size=7), "iteration": 9}, folder / "common.pt")
    found = torch_dist.read(folder).arguments
    assert found == {"args": {"hidden_size": 7}, "iteration": 9}


def test_an_item_may_lie_anywhere_in_its_file(tmp_path: Path) -> None:
    item = saved(TENSORS["a"])
    folder = replace_item(save(tmp_path), "a", item)
    (folder / "other.distcp").write_bytes(b"\0" * 5000 + item + b"PK\5\6" + b"\0" * 30)
    edit(folder, lambda m: set_fields(place(m, "a"), offset=5000))
    assert same(loaded(torch_dist.read(folder).tensors["a"]), TENSORS["a"])
