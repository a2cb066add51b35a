"""Output files: any window equals the whole, files of any size are written whole, and failures have their codes."""

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mtp_convert.engine import gather, runner
from mtp_convert.engine.files import Literal, OutFile
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.engine.runner import Written, write_files
from mtp_convert.errors import ConvertError

WINDOW = 2 * runner.PAGE
SIZES = [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, runner.PAGE, 3 * WINDOW, 5 * WINDOW + 4097, 7]


@dataclass
class Copied:
    """An extent that is a whole source file."""

    path: Path
    nbytes: int

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        reader.read(self.path, lo, out)


@given(st.lists(st.binary(max_size=9), max_size=8), st.randoms(use_true_random=False))
def test_windows_of_any_size_equal_the_whole(parts: list[bytes], rng: random.Random) -> None:
    file, whole, reader = OutFile("f", [Literal(p) for p in parts]), b"".join(parts), Reader()
    assert file.size == len(whole)
    cuts = sorted({0, file.size, *(rng.randint(0, file.size) for _ in range(4))})
    for lo, hi in pairwise(cuts):
        out = np.full(hi - lo, 0xA5, dtype=np.uint8)
        file.fill(reader, out, lo)
        assert out.tobytes() == whole[lo:hi]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WINDOW", WINDOW)


def contents() -> list[bytes]:
    rng = random.Random(5)
    return [rng.randbytes(n) for n in SIZES]


def out_files(folder: Path) -> list[OutFile]:
    """Half of the files from memory, half copied from a source with some literal bytes around."""
    files = []
    for i, data in enumerate(contents()):
        if i % 2 or len(data) < 10:
            files.append(OutFile(f"sub/{i}.bin", [Literal(data)]))
        else:
            source = folder / f"source{i}"
            source.write_bytes(data[3:-4])
            files.append(
                OutFile(
                    f"{i}.bin", [Literal(data[:3]), Copied(source, len(data) - 7), Literal(b""), Literal(data[-4:])]
                )
            )
    return files


def checked(folder: Path, written: Sequence[Written], files: Sequence[OutFile]) -> None:
    assert [w.path for w in written] == [f.path for f in files]
    for result, data in zip(written, contents(), strict=True):
        assert (folder / result.path).read_bytes() == data
        assert result.size == len(data)
        digests = [xxhash.xxh3_128_digest(data[at : at + WINDOW]) for at in range(0, max(len(data), 1), WINDOW)]
        assert result.digest == xxhash.xxh3_128_hexdigest(b"".join(digests))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("direct", [False, True])
def test_files_of_odd_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, direct: bool) -> None:
    monkeypatch.setattr(runner, "DIRECT_FROM", 0 if direct else 1 << 40)
    out = tmp_path / "out"
    out.mkdir()
    seen: list[int] = []
    files = out_files(tmp_path)
    written = write_files(files, out, threads=threads, progress=seen.append)
    checked(out, written, files)
    assert sum(seen) == sum(SIZES)


def test_direct_writing_is_used_and_may_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems create the file and then refuse O_DIRECT."""
    monkeypatch.setattr(runner, "DIRECT_FROM", 0)
    refused = []
    plain_open = os.open

    def picky(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = plain_open(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT and flags & os.O_CREAT:
            os.close(fd)
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fd

    monkeypatch.setattr(os, "open", picky)
    out = tmp_path / "out"
    out.mkdir()
    files = out_files(tmp_path)
    checked(out, write_files(files, out), files)
    assert len(refused) == len(SIZES)


def test_a_source_that_became_shorter(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(3 * WINDOW))
    file = OutFile("f", [Copied(source, 3 * WINDOW + 1)])
    with pytest.raises(ConvertError, match=r"became shorter while it was read in source\.bin") as caught:
        write_files([file], tmp_path / ".", threads=2)
    assert (caught.value.code, caught.value.exit_code) == ("MTP041", 3)


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"no such file in .*nowhere"):
        write_files([OutFile("f", [Copied(tmp_path / "nowhere", 5)])], tmp_path)


@pytest.mark.parametrize("call", ["preadv", "pwrite", "fsync", "open"])
def test_errors_of_the_system_have_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(5 * WINDOW))
    code, number = ("MTP042", errno.EIO) if call == "preadv" else ("MTP040", errno.ENOSPC)
    real = os.open

    def failing(*args: object) -> int:
        if call == "open" and not (isinstance(args[1], int) and args[1] & os.O_CREAT):
            return real(*args)  # type: ignore[arg-type]
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ConvertError) as caught:
        write_files([OutFile("f", [Copied(source, 5 * WINDOW)])], tmp_path)
    assert (caught.value.code, caught.value.exit_code) == (code, 6)
    assert os.strerror(number) in str(caught.value)
    if call == "pwrite":
        assert "free some space" in caught.value.hint


def test_a_disk_that_fills_up_later_stops_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, real = [0], os.pwrite

    def fills_up(fd: int, data: memoryview, at: int) -> int:
        done[0] += 1
        if done[0] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: max(1, len(data) // 2)], at)  # short writes are continued

    monkeypatch.setattr(os, "pwrite", fills_up)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConvertError, match="No space left") as caught:
        write_files([OutFile(str(i), [Literal(bytes(WINDOW))]) for i in range(50)], tmp_path, threads=3)
    assert caught.value.code == "MTP040"
    assert done[0] < 300  # of 700
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    data = random.Random(1).randbytes(3 * WINDOW + 5)
    write_files([OutFile("f", [Literal(data)])], tmp_path)
    assert (tmp_path / "f").read_bytes() == data


def test_a_file_is_never_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"kept")
    with pytest.raises(ConvertError, match="File exists"):
        write_files([OutFile("f", [Literal(b"new")])], tmp_path)
    assert (tmp_path / "f").read_bytes() == b"kept"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, data = os.preadv, random.Random(2).randbytes(5000)
    (tmp_path / "f").write_bytes(data)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:777]], at))
    reader, out = Reader(), np.empty(4000, dtype=np.uint8)
    reader.read(tmp_path / "f", 999, out)
    reader.close()
    assert out.tobytes() == data[999:4999]


def test_many_source_files_keep_few_open(tmp_path: Path) -> None:
    reader, before = Reader(), len(list(Path("/proc/self/fd").iterdir()))
    for i in range(3 * gather.OPEN_FILES):
        path = tmp_path / str(i)
        path.write_bytes(bytes([i]))
        out = np.empty(1, dtype=np.uint8)
        reader.read(path, 0, out)
        assert out[0] == i
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= gather.OPEN_FILES
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
