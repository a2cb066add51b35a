"""Writes output files window by window with a few threads, in constant memory.

Every window is a fixed, aligned range of one file. A worker fills it in its own buffer, hashes it and writes it in
place, past the page cache where the file system allows: a checkpoint is written once and would only push other things
out of memory. System calls release the interpreter lock, so threads are enough.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import numpy as np
import xxhash

from mtp_convert.engine.files import OutFile
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.errors import ConvertError, Problem

WINDOW = 4 << 20  # bytes; larger buffers fall out of the CPU cache, smaller ones cost more calls
PAGE = 4096
DIRECT_FROM = 16 << 20  # bytes; below this a file is written through the page cache

THREADS = 4  # requests in flight: cold reads gain from depth, even on two cores; more gains nothing

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its size, and the xxh3-128 of the xxh3-128 digests of its 4 MiB windows."""

    path: str
    size: int
    digest: str


@dataclass
class _Target:
    """An output file while it is written."""

    file: OutFile
    fd: int
    direct: bool
    left: int
    digests: list[bytes] = field(default_factory=list)


def write_files(
    files: Sequence[OutFile],
    folder: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Write all files below `folder`, which exists. Every file is complete and on disk when this returns.

    Raises:
        ConvertError: MTP040 cannot write, MTP041 the source became shorter, MTP042 cannot read.
    """
    run = _Run(folder, progress or (lambda n: None), _windows(files))
    threads = threads or THREADS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mtp-convert")
    try:
        jobs = [pool.submit(run.work) for _ in range(threads)]
        wait(jobs)
        for job in jobs:
            job.result()
    except BaseException:
        run.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        run.close()
    return tuple(run.done[f.path] for f in files)


def read_files(files: Sequence[OutFile]) -> None:
    """Produce every byte in order and keep none: what other ranks do while the first one writes a sharded module."""
    reader = Reader()
    buffer: Bytes = np.empty(WINDOW, dtype=np.uint8)
    try:
        for file, at in _windows(files):
            file.fill(reader, buffer[: min(WINDOW, file.size - at)], at)
    finally:
        reader.close()


def _windows(files: Sequence[OutFile]) -> Iterator[tuple[OutFile, int]]:
    for file in files:
        for at in range(0, max(file.size, 1), WINDOW):
            yield file, at


class _Run:
    """State shared by the workers of one run."""

    def __init__(self, folder: Path, progress: Progress, todo: Iterator[tuple[OutFile, int]]) -> None:
        self.folder = folder
        self.progress = progress
        self.todo = todo
        self.lock = Lock()
        self.stop = Event()
        self.open: dict[str, _Target] = {}
        self.done: dict[str, Written] = {}

    def work(self) -> None:
        """One worker: take windows until there are none."""
        reader = Reader()
        memory = mmap.mmap(-1, WINDOW)  # page-aligned, as direct writes want
        buffer: Bytes = np.frombuffer(memory, dtype=np.uint8)
        try:
            while not self.stop.is_set():
                with self.lock:
                    task = next(self.todo, None)
                    target = self._target(task[0]) if task else None
                if task is None or target is None:
                    return
                self._window(target, task[1], buffer, reader)
        except BaseException:
            self.stop.set()
            raise
        finally:
            reader.close()

    def _target(self, file: OutFile) -> _Target:
        """The open output file; called under the lock."""
        if file.path not in self.open:
            path = self.folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            windows = max(1, -(-file.size // WINDOW))
            fd, direct = _create(path, file.size)
            self.open[file.path] = _Target(file, fd, direct, windows, [b""] * windows)
        return self.open[file.path]

    def _window(self, target: _Target, at: int, buffer: Bytes, reader: Reader) -> None:
        size = min(WINDOW, target.file.size - at)
        target.file.fill(reader, buffer[:size], at)
        target.digests[at // WINDOW] = xxhash.xxh3_128_digest(buffer.data[:size])
        length = -(-size // PAGE) * PAGE if target.direct else size
        _write(target, buffer.data[:length], at)
        self.progress(size)
        with self.lock:
            target.left -= 1
            finished = target.left == 0
        if finished:
            self._finish(target)

    def _finish(self, target: _Target) -> None:
        """Cut the padding of the last direct write and put everything on disk."""
        file = target.file
        try:
            if target.direct:
                os.ftruncate(target.fd, file.size)
            os.fsync(target.fd)
        except OSError as error:
            raise _cannot_write(error, file.path) from error
        digest = xxhash.xxh3_128_hexdigest(b"".join(target.digests))
        with self.lock:
            os.close(target.fd)
            del self.open[file.path]
            self.done[file.path] = Written(file.path, file.size, digest)

    def close(self) -> None:
        """Close what an aborted run left open."""
        for target in self.open.values():
            os.close(target.fd)


def _create(path: Path, size: int) -> tuple[int, bool]:
    """A new file, past the page cache if it is large and the file system can."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        if size >= DIRECT_FROM and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT, 0o644), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                path.unlink(missing_ok=True)  # some file systems create the file before they refuse
        return os.open(path, flags, 0o644), False
    except OSError as error:
        raise _cannot_write(error, path.name) from error


def _write(target: _Target, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(target.fd, data[done:], at + done)
        except OSError as error:
            raise _cannot_write(error, target.file.path) from error


def _cannot_write(error: OSError, where: str) -> ConvertError:
    hint = "free some space or choose another folder" if error.errno == errno.ENOSPC else ""
    return ConvertError("MTP040", Problem(error.strerror or str(error), where), hint=hint)
