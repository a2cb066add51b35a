"""Compares stored numbers window by window: equal bytes cost one comparison, differences are measured.

A window is a fixed range of elements of both sides. `compare_all` takes windows of many tensors with a few threads, as
the writer does; sums are put together in the order of the windows, so the figures do not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import reduce
from math import isfinite, prod, sqrt
from operator import add
from threading import Event, Lock
from typing import Protocol, TypeVar

import numpy as np

from mtp_convert.containers.base import StoredTensor
from mtp_convert.containers.torch_zip import contiguous
from mtp_convert.encodings.dtype import DType
from mtp_convert.engine.files import Extent
from mtp_convert.engine.gather import Bytes, Reader, cast_values, copy_bytes
from mtp_convert.engine.measure import Example, Tally, measure, same, weigh
from mtp_convert.engine.pieces import CodedPiece, Piece
from mtp_convert.engine.runner import THREADS
from mtp_convert.mapping.views import Side

Task = TypeVar("Task")
ELEMENTS = 1 << 20  # per window


@dataclass(frozen=True, slots=True)
class StoredExtent:
    """A stored tensor in row-major order, whatever its chunks: all of it, or its first `rows`."""

    tensor: StoredTensor
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        rows = self.tensor.shape[:1] if self.rows is None else (self.rows,)
        return prod((*rows, *self.tensor.shape[1:])) * self.dtype.itemsize

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.tensor.dtype

    def fill(self, reader: Reader, out: Bytes, lo: int, hi: int) -> None:
        """Copy bytes [lo, hi) of the tensor into `out`; encoded values are decoded."""
        strides = contiguous(self.tensor.shape)
        n = self.dtype.itemsize
        if self.tensor.encoding is not None:
            whole = Side((0,) * len(strides), tuple(range(len(strides))), (1,) * len(strides))
            piece = CodedPiece(self.tensor.shape, self.tensor, whole, 0, strides)
            cast_values(reader, piece, out, lo=lo // n, hi=hi // n, to=self.dtype)
            return
        for c in self.tensor.chunks:
            start = sum(o * s for o, s in zip(c.offset, strides, strict=True))
            inner = tuple(s * n for s in contiguous(c.sizes))
            copy_bytes(
                reader,
                Piece(c.sizes, c.path, c.start, inner, start, strides, self.dtype),
                out,
                lo=lo,
                hi=hi,
            )


class TypedExtent(Extent, Protocol):
    """An extent of numbers of one element type."""

    @property
    def dtype(self) -> DType:
        """Element type."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two tensors that are not equal bit for bit.

    count: differing elements, of `total`; first: flat index of the first, with `values` on both sides; max_abs: largest
    absolute difference (float64); largest: largest absolute value of the first tensor; norms: Euclidean norms of both
    sides; dot: their inner product; examples: the first few differing elements, where both sides are of one type.
    """

    count: int
    total: int
    first: int
    values: tuple[float, float]
    max_abs: float
    largest: float
    norms: tuple[float, float]
    dot: float
    examples: tuple[Example, ...] = ()

    @property
    def relative(self) -> float:
        """The largest absolute difference over the largest absolute value of the first tensor."""
        if self.largest == 0:
            return 0.0 if self.max_abs == 0 else float("inf")
        return self.max_abs / self.largest if isfinite(self.largest) else float("nan")

    @property
    def cosine(self) -> float:
        """Of the angle between both as vectors; NaN where one of them is zero or not finite."""
        product = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.dot / product)) if product and isfinite(product) else float("nan")

    def text(self) -> str:
        """For people."""
        return f"{self.count} elements differ, first at {self.first}, max difference {self.max_abs:.3g}"


Pair = tuple[TypedExtent, TypedExtent]
Progress = Callable[[int], None]


def compare(a: TypedExtent, b: TypedExtent, reader: Reader, *, progress: Progress | None = None) -> Difference | None:
    """None when both hold the same bits (or the same values, if the element types differ).

    Raises:
        ValueError: the element counts differ.
    """
    worker = Worker(reader)
    windows = list(_windows([(a, b)]))
    tallies = {}
    for window in windows:
        tallies[window.at] = worker.compare(window)
        if progress:
            progress(window.n * a.dtype.itemsize)
    if all(t is None for t in tallies.values()):
        return None
    # The share of equal windows in the norms was not worth its time before a difference was found.
    return _difference((a, b), [tallies[w.at] or worker.weigh(w) for w in windows])


def compare_all(
    pairs: Sequence[Pair], *, threads: int = THREADS, progress: Progress | None = None
) -> list[Difference | None]:
    """`compare` for many pairs at once.

    Raises:
        ValueError: the element counts of a pair differ.
    """
    found: list[dict[int, Tally | None]] = [{} for _ in pairs]

    def first(window: Window, worker: Worker) -> None:
        found[window.pair][window.at] = worker.compare(window)
        if progress:
            progress(window.n * window.a.dtype.itemsize)

    def second(window: Window, worker: Worker) -> None:
        found[window.pair][window.at] = worker.weigh(window)

    in_threads(_windows(pairs), first, threads=threads)
    differing = {i for i, tallies in enumerate(found) if any(tallies.values())}
    equal = (w for w in _windows(pairs) if w.pair in differing and found[w.pair][w.at] is None)
    in_threads(equal, second, threads=threads)
    return [
        _difference(pair, [t for _, t in sorted(found[i].items()) if t is not None]) if i in differing else None
        for i, pair in enumerate(pairs)
    ]


@dataclass(frozen=True, slots=True)
class Window:
    """Elements [at, at + n) of a pair of extents."""

    pair: int
    a: TypedExtent
    b: TypedExtent
    at: int
    n: int


def _windows(pairs: Iterable[Pair]) -> Iterator[Window]:
    for i, (a, b) in enumerate(pairs):
        total = a.nbytes // a.dtype.itemsize
        if total != b.nbytes // b.dtype.itemsize:
            raise ValueError("different numbers of elements")
        for at in range(0, total, ELEMENTS):
            yield Window(i, a, b, at, min(ELEMENTS, total - at))


class Worker:
    """One thread's reader and its buffers, which every window uses again."""

    def __init__(self, reader: Reader | None = None) -> None:
        self.reader = reader or Reader()
        self._buffers: list[Bytes] = [np.empty(0, dtype=np.uint8)] * 2

    def compare(self, window: Window) -> Tally | None:
        """What differs in a window; None where nothing does."""
        a, b = window.a, window.b
        x, y = self._read(0, a, window), self._read(1, b, window)
        if same(x, a.dtype, y, b.dtype):
            return None
        tally = measure(window.at, x, a.dtype, y, b.dtype)
        return tally if tally.count else None

    def weigh(self, window: Window) -> Tally:
        """What a window that is equal on both sides adds to the norms."""
        return weigh(self._read(0, window.a, window), window.a.dtype)

    def _read(self, side: int, extent: TypedExtent, window: Window) -> Bytes:
        size = extent.dtype.itemsize
        if len(self._buffers[side]) < window.n * size:
            self._buffers[side] = np.empty(window.n * size, dtype=np.uint8)
        out = self._buffers[side][: window.n * size]
        extent.fill(self.reader, out, window.at * size, (window.at + window.n) * size)
        return out


def in_threads(tasks: Iterable[Task], work: Callable[[Task, Worker], None], *, threads: int = THREADS) -> None:
    """Do every task, each once, with a few threads; the first error ends all of them."""
    todo, lock, stop = iter(tasks), Lock(), Event()

    def loop() -> None:
        worker = Worker()
        try:
            while not stop.is_set():
                with lock:
                    task = next(todo, None)
                if task is None:
                    return
                work(task, worker)
        except BaseException:
            stop.set()
            raise
        finally:
            worker.reader.close()

    with ThreadPoolExecutor(threads, thread_name_prefix="mtp-convert") as pool:
        try:
            jobs = [pool.submit(loop) for _ in range(threads)]
            wait(jobs)
        except BaseException:  # an interrupt
            stop.set()
            raise
    for job in jobs:
        job.result()


def _difference(pair: Pair, tallies: Iterable[Tally]) -> Difference:
    t = reduce(add, tallies)
    total = pair[0].nbytes // pair[0].dtype.itemsize
    norms = sqrt(t.squares[0]), sqrt(t.squares[1])
    return Difference(t.count, total, t.first, t.values, t.max_abs, t.largest, norms, t.dot, t.examples)
