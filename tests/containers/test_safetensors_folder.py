"""Indices and shards that do not belong together, names that lead outside, and headers that others can read."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from _safetensors_build import HEADER, packed, sharded, tensor_file
from safetensors import safe_open

from mtp_convert.containers import safetensors
from mtp_convert.encodings.dtype import DTYPES
from mtp_convert.errors import ConvertError

ONE, TWO = tensor_file(a=b"1", b=b"22"), tensor_file(c=b"333")
SOUND = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}


def refusal(folder: Path, code: str) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        safetensors.read(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    return caught.value


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    stored = safetensors.read(sharded(tmp_path, SOUND, x=ONE, y=TWO))
    assert {n: t.chunks[0].path.name for n, t in stored.tensors.items()} == SOUND
    assert [f.name for f in stored.files] == ["x.safetensors", "y.safetensors"]
    assert stored.warnings == ()


def test_a_shard_of_an_older_save_is_not_read_and_named(tmp_path: Path) -> None:
    stored = safetensors.read(sharded(tmp_path, SOUND, x=ONE, y=TWO, z=tensor_file(old=b"1")))
    assert stored.tensors.keys() == {"a", "b", "c"}
    assert stored.warnings == ("z.safetensors is not in model.safetensors.index.json and is not read",)


def test_all_missing_shards_are_listed(tmp_path: Path) -> None:
    error = refusal(sharded(tmp_path, {**SOUND, "d": "z.safetensors"}, x=ONE), "MTP011")
    assert [p.where for p in error.problems] == ["y.safetensors", "z.safetensors"]


def test_index_and_shards_from_different_saves(tmp_path: Path) -> None:
    error = refusal(sharded(tmp_path, {**SOUND, "d": "x.safetensors"}, x=ONE, y=TWO), "MTP011")
    assert [p.what for p in error.problems] == ["d is not in the shard that the index names"]
    error = refusal(sharded(tmp_path, {"a": "x.safetensors", "c": "y.safetensors"}, x=ONE, y=TWO), "MTP011")
    assert [(p.what, p.where) for p in error.problems] == [("b is not in the index", "x.safetensors")]
    swapped = {"a": "y.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    assert "a is not in the shard" in str(refusal(sharded(tmp_path, swapped, x=ONE, y=TWO), "MTP011"))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    error = refusal(sharded(tmp_path, SOUND, x=ONE, y=tensor_file(c=b"3", a=b"1")), "MTP012")
    assert error.problems[0].line() == "a is stored twice in x.safetensors and y.safetensors"


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    assert "y.safetensors" in str(refusal(sharded(tmp_path, SOUND, x=ONE, y=TWO[:-1]), "MTP010"))


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '"text"',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        '{"weight_map": ' + '{"a": ' * 100_000,
        "\xff",
    ],
)
def test_damaged_indices(tmp_path: Path, text: str) -> None:
    sharded(tmp_path, SOUND, x=ONE, y=TWO)
    (tmp_path / safetensors.INDEX).write_text(text, encoding="latin-1")
    error = refusal(tmp_path, "MTP011")
    assert error.problems[0].where == safetensors.INDEX


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        "sub/../../x",
        "x\0y",
        "",
        ".",
        "x\x1b[31m",
        "a\ud800",
        "n" * 300,
        "../s/x",
    ],
)
def test_an_index_never_leads_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(ONE)
    sharded(folder, {"a": name, "b": name}, x=ONE)
    with pytest.raises(ConvertError) as caught:
        safetensors.read(folder)
    assert caught.value.code in ("MTP015", "MTP011")
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    if name != ".":
        assert caught.value.code == "MTP015"


@pytest.mark.parametrize("name", ["C:\\x.safetensors", "https://host/x.safetensors", "file:x"])
def test_spellings_of_other_systems_are_plain_missing_files(tmp_path: Path, name: str) -> None:
    assert "shard is missing" in str(refusal(sharded(tmp_path, {"a": name}, x=ONE), "MTP011"))


@pytest.mark.parametrize("where", ["model.safetensors", "shard", "index"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "deep" / "model"
    folder.mkdir(parents=True)
    outside = tmp_path / "secret"
    if where == "index":
        sharded(folder, SOUND, x=ONE, y=TWO)
        (folder / safetensors.INDEX).rename(outside)
        (folder / safetensors.INDEX).symlink_to(outside)
    elif where == "shard":
        sharded(folder, SOUND, x=ONE)
        outside.write_bytes(TWO)
        (folder / "y.safetensors").symlink_to(outside)
    else:
        outside.write_bytes(ONE)
        (folder / where).symlink_to(outside)
    assert refusal(folder, "MTP015").problems


def test_a_loop_of_links(tmp_path: Path) -> None:
    sharded(tmp_path, SOUND, x=ONE)
    (tmp_path / "y.safetensors").symlink_to("z.safetensors")
    (tmp_path / "z.safetensors").symlink_to("y.safetensors")
    with pytest.raises(ConvertError) as caught:
        safetensors.read(tmp_path)
    assert caught.value.exit_code == 3


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abcd").write_bytes(ONE)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert safetensors.read(snapshot).tensors.keys() == {"a", "b"}


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(ONE)
    (tmp_path / "model.safetensors").symlink_to("real.bin")
    assert safetensors.read(tmp_path).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_a_shard_that_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    sharded(tmp_path, SOUND, x=ONE)
    path = tmp_path / "y.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ConvertError, match=r"y\.safetensors") as caught:
        safetensors.read(tmp_path)
    assert caught.value.exit_code == 3


def test_a_single_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    sharded(tmp_path, SOUND, x=ONE, y=TWO, model=ONE)
    assert "both model.safetensors and an index" in str(refusal(tmp_path, "MTP011"))


def test_folders_without_a_readable_set(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "no .safetensors file" in str(refusal(tmp_path, "MTP002"))
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(ONE)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(TWO)
    assert "2 .safetensors files and no model.safetensors.index.json" in str(refusal(tmp_path, "MTP002"))


def test_one_file_of_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(packed(HEADER))
    assert safetensors.read(tmp_path).tensors.keys() == {"a", "b"}


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.arange(n, dtype=torch.int64).remainder(2 if dtype == torch.bool else 120).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3), (2, 1, 5)], ids=str)
def test_the_safetensors_library_reads_what_we_describe(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {f"n.{d.name} ä": values(d.torch(), shape) for d in DTYPES}
    described = [(n, d.name, shape, t.nbytes) for d, (n, t) in zip(DTYPES, tensors.items(), strict=True)]
    header = safetensors.header_bytes(described, {"format": "pt"})
    data = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors.values())
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert len(header) % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    own = safetensors.read(tmp_path).tensors
    assert {n: (t.dtype.torch(), t.shape) for n, t in own.items()} == {n: (t.dtype, shape) for n, t in tensors.items()}
    assert json.loads(header)["__metadata__"] == {"format": "pt"}
