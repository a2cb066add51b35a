"""Reads a safetensors folder whose shards lie elsewhere: headers by byte range, and payload only where it is needed.

What moves the bytes is given from outside (`Ranges`). Every byte that arrives is kept in a sparse scratch file, so that
none is asked for twice, however often a conversion reads it.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Protocol

from mtp_convert.containers import safetensors
from mtp_convert.containers.base import Place, Stored, StoredTensor
from mtp_convert.errors import ConvertError, Problem

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LENGTH = 8  # bytes of the length in front of a safetensors header
CONNECTIONS = 8  # requests in flight
SEGMENT = 32 << 20  # bytes of one request; more gains nothing, and a dropped one is continued where it broke off


class _Stopped(Exception):
    """Nobody waits for these bytes any more."""


Span = tuple[int, int]  # first byte, byte after the last one


class Ranges(Protocol):
    """One file that lies elsewhere and does not change."""

    @property
    def name(self) -> str:
        """What an error message calls it."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) in order, in blocks of any size; safe to call from several threads."""


class RemoteFile:
    """A file elsewhere, as a place that tensors can be read from.

    scratch: folder for the sparse file (None: the system's). It has no name there, so nothing can be left behind.
    """

    def __init__(self, ranges: Ranges, *, scratch: Path | None = None) -> None:
        self._ranges = ranges
        self._scratch = scratch
        self._fd: int | None = None
        self._have: list[Span] = []  # sorted, apart from each other
        self._lock = Lock()

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._ranges.name

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._ranges.size

    def header(self) -> bytes:
        """The raw safetensors header: two requests, for exactly its bytes.

        Raises:
            ConvertError: MTP010.
        """
        opening = b"".join(self._ranges.blocks(0, min(LENGTH, self.size)))
        length = safetensors.header_length(self, opening, self.size)
        return b"".join(self._ranges.blocks(LENGTH, LENGTH + length))

    def read_into(self, at: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out` from byte `at`."""
        stop = at + len(out)
        with self._lock:
            fd = self._file()
            for span in missing(self._have, (at, stop)):
                self._receive(fd, span, lambda n: None)
                self._have = merged([*self._have, span])
        view, done = out.data, 0
        while done < len(view):
            n = os.preadv(fd, [view[done:]], at + done)
            if n == 0:
                raise ConvertError("MTP041", Problem("file ends early", self.name, f"{self.size} bytes"))
            done += n

    def fetch(self, span: Span, tick: Callable[[int], None]) -> None:
        """Bring bytes here that nobody else is bringing; `tick` gets every number of bytes that arrived."""
        with self._lock:
            fd = self._file()
        self._receive(fd, span, tick)
        with self._lock:
            self._have = merged([*self._have, span])

    def absent(self, spans: Iterable[Span]) -> list[Span]:
        """The parts of some byte ranges that are not here yet, adjacent ones merged."""
        with self._lock:
            have = self._have
        return [gap for span in merged(spans) for gap in missing(have, span)]

    def _receive(self, fd: int, span: Span, tick: Callable[[int], None]) -> None:
        at = span[0]
        for block in self._ranges.blocks(*span):
            _write(fd, block, at)
            at += len(block)
            tick(len(block))

    def _file(self) -> int:
        """The sparse file; called under the lock."""
        if self._fd is None:
            with tempfile.TemporaryFile(prefix="mtp-convert-", dir=self._scratch) as file:
                self._fd = os.dup(file.fileno())
            os.ftruncate(self._fd, self.size)
        return self._fd

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _write(fd: int, block: bytes, at: int) -> None:
    done = 0
    while done < len(block):
        try:
            done += os.pwrite(fd, block[done:], at + done)
        except OSError as error:
            hint = "bytes from elsewhere are kept in a temporary file until the output is complete"
            raise ConvertError("MTP040", Problem(error.strerror or str(error), "scratch file"), hint=hint) from error


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in as few ranges as possible, sorted; ranges of no bytes are left out."""
    found: list[Span] = []
    for start, stop in sorted(s for s in spans if s[0] < s[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def missing(have: Sequence[Span], span: Span) -> Iterator[Span]:
    """The parts of a range that none of `have` (sorted, apart from each other) covers."""
    at, stop = span
    first = max(0, bisect_right(have, (at, stop)) - 1)
    for begin, end in have[first : bisect_left(have, (stop, 0))]:
        if at < begin:
            yield at, begin
        at = max(at, end)
    if at < stop:
        yield at, stop


def read(folder: Path, places: Sequence[Place]) -> Stored:
    """What the files of a safetensors folder hold, from headers alone, some of them elsewhere.

    Args:
        folder: where the index is, if there is one. places: every file that it names.

    Raises:
        ConvertError: as `safetensors.read`.
    """
    path = folder / safetensors.INDEX
    weight_map = safetensors.index(path) if path.is_file() else None
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = list(pool.map(_header, places))
    return safetensors.stored(folder, dict(zip(places, headers, strict=True)), weight_map)


def _header(place: Place) -> safetensors.Header:
    if isinstance(place, Path):
        return safetensors.read_file(place)
    assert isinstance(place, RemoteFile)
    raw = place.header()
    return raw, safetensors.tensors_of(place, raw, place.size)


def fetch(spans: Iterable[tuple[RemoteFile, Span]], tick: Callable[[int], None]) -> None:
    """Bring byte ranges here, several at a time.

    Args:
        spans: what `absent` found. tick: gets every number of bytes that arrived.
    """
    stop = Event()

    def counted(n: int) -> None:
        if stop.is_set():
            raise _Stopped
        tick(n)

    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        todo = ((file, part) for file, span in spans for part in _parts(span))
        for job in [pool.submit(file.fetch, part, counted) for file, part in todo]:
            job.result()
    finally:
        stop.set()  # one failure, or the user, ends what the others are doing
        pool.shutdown(wait=True, cancel_futures=True)


def absent(tensors: Iterable[StoredTensor]) -> list[tuple[RemoteFile, Span]]:
    """The byte ranges of tensors that lie elsewhere and are not here yet, adjacent ones merged."""
    wanted: dict[RemoteFile, list[Span]] = {}
    for tensor in tensors:
        for raw in tensor.encoding.raw if tensor.encoding is not None else (tensor,):
            for chunk in raw.chunks:
                if isinstance(chunk.path, RemoteFile):
                    stop = chunk.start + prod(chunk.sizes) * raw.dtype.itemsize
                    wanted.setdefault(chunk.path, []).append((chunk.start, stop))
    return [(file, gap) for file, spans in wanted.items() for gap in file.absent(spans)]


def _parts(span: Span) -> Iterator[Span]:
    start, stop = span
    for at in range(start, stop, SEGMENT):
        yield at, min(at + SEGMENT, stop)
