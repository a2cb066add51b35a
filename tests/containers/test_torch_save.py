"""Files of many tensors, written without torch: torch reads them, sizes beyond 4 GiB and 65535 members included."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from mtp_convert.containers import torch_zip
from mtp_convert.containers.pickle_write import dumps
from mtp_convert.containers.torch_save import ALIGN, archive, tensor
from mtp_convert.encodings.dtype import BY_NAME, DType

BF16, F32, U8 = (BY_NAME[n] for n in ("BF16", "F32", "U8"))
GIB = 1 << 30


def lay_out(path: Path, tensors: dict[str, tuple[DType, tuple[int, ...]]]) -> list[int]:
    """A file with holes where the tensors go; returns where."""
    records = {n: tensor(d, s, i) for i, (n, (d, s)) in enumerate(tensors.items())}
    sizes = [torch.Size(s).numel() * d.itemsize for d, s in tensors.values()]
    gaps = archive(dumps(records), sizes)
    starts = []
    with path.open("wb") as file:
        for gap, size in zip(gaps, [*sizes, 0], strict=True):
            file.write(gap)
            starts.append(file.tell())
            file.seek(size, os.SEEK_CUR)
        file.truncate()
    return starts[:-1]


def members(path: Path) -> dict[str, torch_zip.Member]:
    with path.open("rb") as file:
        return torch_zip.members(file.fileno(), 0, path.stat().st_size)


def test_torch_reads_what_lies_in_the_gaps(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    starts = lay_out(path, {"a": (F32, (3, 4)), "none": (U8, (0,)), "b": (BF16, (5,)), "scalar": (F32, ())})
    a, b, scalar = torch.randn(3, 4), torch.randn(5).bfloat16(), torch.randn(())
    with path.open("r+b") as file:
        for start, value in zip((starts[0], starts[2], starts[3]), (a, b, scalar), strict=True):
            file.seek(start)
            file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert all(start % ALIGN == 0 for start in starts)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == ["a", "none", "b", "scalar"]
        assert torch.equal(found["a"], a)
        assert torch.equal(found["b"], b)
        assert torch.equal(found["scalar"], scalar)
        assert (found["none"].dtype, found["none"].shape) == (torch.uint8, (0,))


def test_positions_and_sizes_beyond_4_gib(tmp_path: Path) -> None:
    """The file is nearly all hole."""
    path = tmp_path / "large.pt"
    rows = 5 * GIB // 4
    starts = lay_out(path, {"a": (F32, (7,)), "large": (F32, (rows,)), "behind": (BF16, (3,))})
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    with path.open("r+b") as file:
        file.seek(starts[2])
        file.write(values.view(torch.uint8).numpy().tobytes())
    found = members(path)
    assert [found[f"data/{i}"].start for i in range(3)] == starts
    assert found["data/1"].size == 5 * GIB
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["large"].shape == (rows,)
    assert torch.equal(loaded["behind"], values)
    with zipfile.ZipFile(path) as zipped:
        assert zipped.getinfo("archive/data/1").file_size == 5 * GIB


def test_more_members_than_a_zip_can_count(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    count = 0xFFFF - 2  # the pickle, the byte order and the version are members too
    path.write_bytes(b"".join(archive(b"", [0] * count)))
    found = members(path)
    assert len(found) == count + 2
    with zipfile.ZipFile(path) as zipped:
        assert len(zipped.infolist()) == count + 3
