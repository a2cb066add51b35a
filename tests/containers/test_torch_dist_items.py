"""Damaged items inside torch_dist files: the zip records, the structure, and bytes changed at random."""

import os
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _dist_build import FILE, TENSORS, archive, loaded, replace_item, same, save, saved, zipped
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_convert.containers import torch_dist, torch_zip
from mtp_convert.containers.base import Stored
from mtp_convert.containers.torch_save import frame
from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.errors import ConvertError

A = TENSORS["a"]


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save(Path(folder) / "c")


def pickled() -> bytes:
    """The structure of tensor `a` as torch writes it."""
    with tempfile.TemporaryFile() as file:
        torch.save(A, file)
        with zipfile.ZipFile(file) as archived:
            return archived.read(next(n for n in archived.namelist() if n.endswith("data.pkl")))


PKL = pickled()
ITEMS: dict[str, tuple[bytes, str]] = {
    "another dtype": (saved(A.int()), "got I32 [3, 4], expected F32 [3, 4]"),
    "another shape": (saved(A.T.contiguous()), "got F32 [4, 3], expected F32 [3, 4]"),
    "not contiguous": (saved(A.T.contiguous().T), "not contiguous"),
    "expanded": (saved(torch.zeros(1).expand(3, 4)), "not contiguous"),
    "a list": (saved([A]), "holds a list"),
    "a number": (saved(5), "holds a int"),
    "compressed": (archive(PKL, bytes(48), packed=True), "compressed member"),
    "big-endian": (archive(PKL, bytes(48), order=b"big"), "big-endian"),
    "too few bytes": (archive(PKL, bytes(47)), "larger than its bytes"),
    "no payload": (zipped(("data.pkl", PKL)), "its bytes are missing"),
    "no structure": (zipped(("data/0", bytes(48))), "no data.pkl"),
    "no zip": (bytes(500), "no end record"),
    "legacy torch.save": (saved(A, legacy=True), "no end record"),
    "an empty zip": (b"PK\5\6" + bytes(18), "no data.pkl"),
    "a huge member count": (b"PK\5\6" + bytes(4) + b"\xff" * 4 + bytes(10), "bad central directory"),
    "directory outside": (b"PK\5\6" + bytes(8) + b"\xff" * 8 + b"\0\0", "outside the item"),
    "directory cut short": (b"PK\1\2" + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, 4, 0, 0), "cut short"),
    "bad zip64 locator": (b"PK\6\7" + b"\xff" * 16 + b"PK\5\6" + bytes(18), "cut short or out of range"),
    "a second structure": (zipped(("data.pkl", PKL), ("data.pkl", PKL), ("data/0", bytes(48))), "two members"),
    "a second payload": (zipped(("data.pkl", PKL), ("data/0", bytes(48)), ("data/0", bytes(48))), "two members"),
}


@pytest.mark.parametrize("what", ITEMS)
def test_damaged_items(sound: Path, tmp_path: Path, what: str) -> None:
    item, message = ITEMS[what]
    folder = replace_item(shutil.copytree(sound, tmp_path / "c"), "a", item)
    with pytest.raises(ConvertError, match=re.escape(message)) as caught:
        torch_dist.read(folder)
    assert (caught.value.code, caught.value.exit_code) == ("MTP013", 3)
    assert "other.distcp" in str(caught.value)


def test_a_sparse_tensor_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = replace_item(shutil.copytree(sound, tmp_path / "c"), "a", saved(A.to_sparse()))
    with pytest.raises(ConvertError, match=r"torch\._utils\._rebuild_sparse_tensor"):
        torch_dist.read(folder)


def test_an_item_by_pythons_zip_writer_is_read(sound: Path, tmp_path: Path) -> None:
    folder = replace_item(shutil.copytree(sound, tmp_path / "c"), "a", archive(PKL, A.numpy().tobytes()))
    assert same(loaded(torch_dist.read(folder).tensors["a"]), A)


def zip64(payload: bytes) -> bytes:
    """An item whose sizes, offsets and end record all stand in zip64 structures."""
    out, directory = b"", b""
    for name, data in ((b"archive/data.pkl", PKL), (b"archive/data/0", payload)):
        at, crc, big = len(out), 0, 0xFFFFFFFF
        sizes = struct.pack("<2H2Q", 1, 16, len(data), len(data))
        out += struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, big, big, len(name), len(sizes)) + name + sizes
        out += data
        other = struct.pack("<2HL", 0x7777, 4, 0)  # a field of somebody else in front
        where = other + struct.pack("<2H3Q", 1, 24, len(data), len(data), at)
        head = (b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, big, big, len(name), len(where), 0, 0, 0, 0, big)
        directory += struct.pack("<4s6H3L5H2L", *head) + name + where
    at = len(out)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return out + directory + end64 + locator + end


def test_zip64_records(sound: Path, tmp_path: Path) -> None:
    folder = replace_item(shutil.copytree(sound, tmp_path / "c"), "a", zip64(A.numpy().tobytes()))
    assert same(loaded(torch_dist.read(folder).tensors["a"]), A)


def test_a_zip64_field_that_is_cut_short(sound: Path, tmp_path: Path) -> None:
    item = zip64(A.numpy().tobytes()).replace(struct.pack("<2H", 1, 24), struct.pack("<2H", 1, 8))
    folder = replace_item(shutil.copytree(sound, tmp_path / "c"), "a", item)
    with pytest.raises(ConvertError) as caught:
        torch_dist.read(folder)
    assert caught.value.code == "MTP013"


@pytest.mark.parametrize("gib", [4, 6])
def test_a_payload_of_gigabytes(tmp_path: Path, gib: int) -> None:
    """Sparse file: sizes and positions beyond 32 bits, read by torch and by us."""
    shape, payload = (gib, 1 << 29), gib << 30
    made = frame(BY_NAME["BF16"], shape)
    path = tmp_path / "item"
    with path.open("wb") as file:
        file.write(made.prefix)
        file.seek(payload - 2, os.SEEK_CUR)
        file.write(b"\x80\x3f" + made.suffix)
    fd = os.open(path, os.O_RDONLY)
    found = torch_zip.members(fd, 0, path.stat().st_size)
    at = torch_zip.locate(torch_zip.read_structure(fd, found, "item"), found)
    os.close(fd)
    assert (at.dtype.name, at.shape, at.start) == ("BF16", shape, len(made.prefix))
    tensor = torch.load(path, weights_only=True, mmap=True)
    assert tensor.shape == shape
    assert tensor[-1, -1] == 1.0
    assert tensor[0, 0] == 0.0


def read_or_refused(folder: Path) -> Stored | ConvertError:
    try:
        return torch_dist.read(folder)
    except ConvertError as error:
        return error


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [FILE, ".metadata"])
def test_fuzzed_bytes_are_refused_or_read(sound: Path, name: str, data: st.DataObject) -> None:
    folder = sound.with_name("fuzz")
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    raw = bytearray((sound / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(1, 8))] = data.draw(st.binary(min_size=1, max_size=8))
    (folder / name).write_bytes(raw)
    found = read_or_refused(folder)
    if isinstance(found, ConvertError):
        assert found.exit_code == 3
        return
    for tensor in found.tensors.values():
        assert loaded(tensor).shape == tensor.shape
