"""Damaged torch_dist folders: refused with exit code 3, a code, and the name of the file that is off."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _dist_build import FILE, TENSORS, edit, place, save, set_fields

from mtp_convert.containers import torch_dist
from mtp_convert.errors import ConvertError


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save(Path(folder) / "c")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "c")


def refusal(folder: Path, code: str = "MTP013") -> str:
    with pytest.raises(ConvertError) as caught:
        torch_dist.read(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert all(p.line().isprintable() and len(p.line()) < 500 for p in caught.value.problems)
    return "\n".join(p.line() for p in caught.value.problems)


def test_files_that_are_short_or_missing(folder: Path) -> None:
    path = folder / FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"file is truncated in {FILE}" in refusal(folder)
    path.write_bytes(data[: len(data) // 2])
    assert f"file is truncated in {FILE}" in refusal(folder)
    path.unlink()
    assert f"file is missing in {FILE}" in refusal(folder)
    path.mkdir()
    assert f"file is missing in {FILE}" in refusal(folder)
    path.rmdir()
    os.mkfifo(path)
    assert f"file is missing in {FILE}" in refusal(folder)


def test_every_missing_file_is_listed(folder: Path) -> None:
    edit(folder, lambda m: [set_fields(place(m, n), relative_path=f"gone-{n}") for n in TENSORS])
    assert refusal(folder).count("file is missing in gone-") == 2


def test_metadata_that_is_short_missing_or_huge(folder: Path) -> None:
    path = folder / ".metadata"
    data = path.read_bytes()
    for n in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        assert ".metadata" in refusal(folder)
    with path.open("wb") as file:
        file.truncate(1 << 42)  # sparse: nothing is allocated for it
    assert "are no checkpoint metadata" in refusal(folder)
    path.unlink()
    assert ".metadata" in refusal(folder, "MTP002")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..", "a/../../x", "x\0y", "", b"bytes", 7, None, ["list"], {}, "x\x1b[0m", "n" * 300],
)
def test_a_relative_path_never_leads_outside(folder: Path, name: object) -> None:
    edit(folder, lambda m: set_fields(place(m, "a"), relative_path=name))
    refusal(folder, "MTP015" if isinstance(name, str) else "MTP013")


def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / FILE).rename(tmp_path / "outside")
    (folder / FILE).symlink_to(tmp_path / "outside")
    assert "refers to" in refusal(folder, "MTP015")


def chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Any], None]:
    """Other chunks for tensor `a` of shape [3, 4]; every one finds the same item."""

    def change(meta: Any) -> None:  # noqa: ANN401 - torch's own record
        chunk = type(meta.state_dict_metadata["a"].chunks[0])
        meta.state_dict_metadata["a"].chunks = [chunk(torch.Size(o), torch.Size(s)) for o, s in boxes]
        index, info = next((i, p) for i, p in meta.storage_data.items() if i.fqn == "a")
        for n, (offset, _) in enumerate(boxes):
            meta.storage_data[type(index)("a", torch.Size(offset), n)] = info

    return change


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 0), (2, 4))], "hole"),
        ([((0, 0), (2, 4)), ((1, 0), (1, 4))], "overlap"),
        ([((0, 0), (3, 4)), ((0, 0), (3, 4))], "overlap"),
        ([((0, 0), (3, 2)), ((0, 1), (3, 2))], "overlap"),
        ([((1, 0), (3, 4))], "overlap or leave a hole"),
        ([((0, 0), (3, 5))], "overlap or leave a hole"),
        ([((0,), (12,))], "overlap or leave a hole"),
        ([], "hole"),
    ],
)
def test_chunks_that_do_not_tile(folder: Path, monkeypatch: pytest.MonkeyPatch, boxes: list[Any], message: str) -> None:
    monkeypatch.setattr(torch_dist._ItemReader, "payload", lambda *a: 0)  # look at the boxes alone
    assert message in refusal(edit(folder, chunks(*boxes)))


def test_tiles_equals_counting() -> None:
    """Random boxes against a counting array."""
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        shape = (rng.randint(1, 3), rng.randint(1, 3))
        count, found = torch.zeros(shape, dtype=torch.int64), []
        for _ in range(rng.randint(1, 4)):
            offset = tuple(rng.randrange(n) for n in shape)
            sizes = tuple(
                rng.randint(0 if rng.random() < 0.1 else 1, n - o) for n, o in zip(shape, offset, strict=True)
            )
            count[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] += 1
            found.append(torch_dist.StoredChunk(offset, sizes, Path(), 0))
        exact = bool((count == 1).all())
        assert torch_dist._tiles(shape, found) == exact, (shape, found)
        seen.add(exact)
    assert seen == {True, False}


METADATA_FIELDS: dict[str, Callable[[Any], object]] = {
    "sizes as text": lambda m: set_fields(m.state_dict_metadata["a"], size="3x4"),
    "sizes as a list": lambda m: set_fields(m.state_dict_metadata["a"], size=[3, 4]),
    "negative size": lambda m: set_fields(m.state_dict_metadata["a"], size=(-3, -4)),
    "fractional size": lambda m: set_fields(m.state_dict_metadata["a"], size=(3.0, 4)),
    "a thousand dimensions": lambda m: set_fields(m.state_dict_metadata["a"], size=(1 << 60,) * 1000),
    "another shape": lambda m: set_fields(m.state_dict_metadata["a"], size=torch.Size((4, 3))),
    "chunks are a number": lambda m: set_fields(m.state_dict_metadata["a"], chunks=5),
    "a chunk is a text": lambda m: set_fields(m.state_dict_metadata["a"], chunks=["x"]),
    "no chunks": lambda m: set_fields(m.state_dict_metadata["a"], chunks=None),
    "chunk sizes as text": lambda m: set_fields(m.state_dict_metadata["a"].chunks[0], sizes="34"),
    "another dtype": lambda m: set_fields(m.state_dict_metadata["a"].properties, dtype=torch.int32),
    "no properties": lambda m: set_fields(m.state_dict_metadata["a"], properties=None),
    "an entry is a text": lambda m: m.state_dict_metadata.update(a="x"),
    "an entry is named by a number": lambda m: m.state_dict_metadata.update({5: m.state_dict_metadata["a"]}),
    "a name with escape codes": lambda m: m.state_dict_metadata.update({"\x1b[31m": m.state_dict_metadata["a"]}),
    "a tensor stored nowhere": lambda m: m.state_dict_metadata.update(c=m.state_dict_metadata["a"]),
    "no entries": lambda m: set_fields(m, state_dict_metadata=None),
    "no storage": lambda m: set_fields(m, storage_data=None),
    "storage is a list": lambda m: set_fields(m, storage_data=[1]),
    "storage of texts": lambda m: set_fields(m, storage_data={"a": "b"}),
    "position as text": lambda m: set_fields(place(m, "a"), offset="0"),
    "negative position": lambda m: set_fields(place(m, "a"), offset=-1),
    "position beyond the file": lambda m: set_fields(place(m, "a"), offset=1 << 40),
    "position beyond 2^63": lambda m: set_fields(place(m, "a"), offset=1 << 63),
    "length as text": lambda m: set_fields(place(m, "a"), length="9"),
    "length of nothing": lambda m: set_fields(place(m, "a"), length=0),
    "boolean length": lambda m: set_fields(place(m, "a"), length=True),
    "position off by one": lambda m: set_fields(place(m, "a"), offset=place(m, "a").offset + 1),
    "the item of another tensor": lambda m: set_fields(place(m, "a"), **vars(place(m, "b"))),
    "compressed by an extension": lambda m: set_fields(place(m, "a"), transform_descriptors=["zstd"]),
    "an index without a name": lambda m: [set_fields(i, fqn=None) for i in m.storage_data],
    "an offset that is no offset": lambda m: [set_fields(i, offset=(-1,)) for i in m.storage_data if i.fqn == "a"],
}


@pytest.mark.parametrize("what", METADATA_FIELDS)
def test_damaged_metadata_fields(folder: Path, what: str) -> None:
    text = refusal(edit(folder, METADATA_FIELDS[what]))
    assert "MetadataIndex(" not in text


def test_an_element_type_that_nobody_supports(folder: Path) -> None:
    edit(folder, lambda m: set_fields(m.state_dict_metadata["a"].properties, dtype=torch.complex64))
    assert "torch.complex64" in refusal(folder, "MTP014")
