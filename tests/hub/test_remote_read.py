"""A safetensors folder whose shards lie elsewhere: the same facts and refusals as of files, no byte moved twice."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from _kit import TINY
from hypothesis import given
from hypothesis import strategies as st

from mtp_convert.containers import remote, safetensors
from mtp_convert.containers.base import Stored
from mtp_convert.containers.remote import RemoteFile, Span, merged, missing
from mtp_convert.errors import ConvertError

SHARDS = sorted(p.name for p in TINY.glob("*.safetensors"))


@dataclass
class Local:
    """Ranges of a file on disk, and which of them were asked for."""

    path: Path
    asked: list[Span] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        self.asked.append((start, stop))
        data = self.path.read_bytes()[start:stop]
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    @property
    def moved(self) -> int:
        return sum(stop - start for start, stop in self.asked)


def elsewhere(folder: Path) -> tuple[list[Local], Stored]:
    files = [Local(folder / name) for name in SHARDS]
    return files, remote.read(folder, [RemoteFile(f) for f in files])


def test_headers_say_the_same_as_of_files() -> None:
    files, found = elsewhere(TINY)
    expected = safetensors.read(TINY)
    assert found.headers == expected.headers
    assert [f.name for f in found.files] == [f.name for f in expected.files]
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        own = expected.tensors[name]
        assert (tensor.dtype, tensor.shape) == (own.dtype, own.shape)
        assert [(c.path.name, c.start) for c in tensor.chunks] == [(c.path.name, c.start) for c in own.chunks]
    assert sum(f.moved for f in files) == sum(8 + len(h) for h in expected.headers.values())


def test_some_shards_may_be_here() -> None:
    far = Local(TINY / SHARDS[1])
    found = remote.read(TINY, [TINY / SHARDS[0], RemoteFile(far)])
    assert found.headers == safetensors.read(TINY).headers


def test_payload_is_moved_once_in_adjacent_ranges() -> None:
    files, found = elsewhere(TINY)
    for file in files:
        file.asked.clear()
    shard = [t for t in found.tensors.values() if t.chunks[0].path.name == SHARDS[0]]
    ticks: list[int] = []
    spans = remote.absent([*shard, *shard[:3]])
    remote.fetch(spans, ticks.append)
    start = 8 + len(found.headers[SHARDS[0]])
    assert files[0].asked == [(start, files[0].size)], "one range: all tensors of a shard lie beside each other"
    assert sum(ticks) == files[0].moved == sum(t.nbytes for t in shard)
    assert files[1].asked == []
    assert remote.absent(shard) == []


def test_a_long_range_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SEGMENT", 100_000)
    file = Local(TINY / SHARDS[0])
    remote.fetch([(RemoteFile(file), (5, 350_005))], lambda n: None)
    assert sorted(file.asked) == [(5, 100_005), (100_005, 200_005), (200_005, 300_005), (300_005, 350_005)]


def test_one_failure_ends_what_the_others_are_doing() -> None:
    class Endless(Local):
        def blocks(self, start: int, stop: int) -> Iterator[bytes]:
            while True:
                yield b"x"

    class Broken(Local):
        def blocks(self, start: int, stop: int) -> Iterator[bytes]:
            raise ConvertError("MTP055", "no connection")

    places = [RemoteFile(kind(TINY / SHARDS[0])) for kind in (Broken, Endless)]
    with pytest.raises(ConvertError) as caught:
        remote.fetch([(place, (0, 100)) for place in places], lambda n: None)
    assert caught.value.code == "MTP055"


@given(st.integers(0, 2**32))
def test_any_reads_move_every_byte_once(seed: int) -> None:
    rng = random.Random(seed)
    file = Local(TINY / "tokenizer.json")
    place, data = RemoteFile(file), file.path.read_bytes()
    touched: set[int] = set()
    for _ in range(12):
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.randrange(400))
        if rng.random() < 0.3:
            for gap in place.absent([(start, stop)]):
                place.fetch(gap, lambda n: None)
        out = np.full(stop - start, 255, dtype=np.uint8)
        place.read_into(start, out)
        assert out.tobytes() == data[start:stop]
        touched |= set(range(start, stop))
    assert file.moved == len(touched)


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: (min(s), max(s))), max_size=8)


def bytes_of(found: list[Span]) -> list[int]:
    return [b for start, stop in found for b in range(start, stop)]


@given(spans)
def test_merged(found: list[Span]) -> None:
    after = merged(found)
    assert bytes_of(after) == sorted(set(bytes_of(found)))
    assert all(a[1] < b[0] for a, b in pairwise(after)), "as few as possible"


@given(spans, st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: (min(s), max(s))))
def test_missing(have: list[Span], wanted: Span) -> None:
    gaps = list(missing(merged(have), wanted))
    assert bytes_of(gaps) == sorted(set(range(*wanted)) - set(bytes_of(have)))


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x00",
    "no header": struct.pack("<Q", 0) + b"{}",
    "endless header": struct.pack("<Q", 1 << 63) + b"{}",
    "header beyond the end": struct.pack("<Q", 1000) + b"{}",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "HTML": b"<!DOCTYPE html><html><body>no</body></html>",
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "trailing bytes": struct.pack("<Q", 2) + b"{}" + b"x",
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_shard_is_refused_in_the_same_words(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ConvertError) as here:
        safetensors.read(tmp_path)
    with pytest.raises(ConvertError) as there:
        remote.read(tmp_path, [RemoteFile(Local(path))])
    assert there.value.code == "MTP010"
    assert there.value.problems == here.value.problems


def test_a_wrong_index_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    index = folder / safetensors.INDEX
    index.write_text(index.read_text().replace("mtp.layers.0.eh_proj.weight", "mtp.layers.0.eh_prod.weight"))
    with pytest.raises(ConvertError) as caught:
        elsewhere(folder)
    assert caught.value.code == "MTP011"
    assert len(caught.value.problems) == 2


def test_nothing_is_left_in_the_scratch_folder(tmp_path: Path) -> None:
    place = RemoteFile(Local(TINY / SHARDS[0]), scratch=tmp_path)
    place.read_into(0, np.empty(5000, dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []
