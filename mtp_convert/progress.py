"""Progress on stderr: a bar on a terminal, one line per half minute elsewhere, nothing when asked for quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from time import monotonic
from typing import Protocol

from mtp_convert.summary import size_text

LINE_EVERY = 30.0  # seconds


class Phases(Protocol):
    """Begins a phase of a long run: `progress`, or anything like it."""

    def __call__(self, phase: str, total: int, *, unit: str = "B") -> AbstractContextManager[Callable[[int], None]]:
        """A function to call with numbers of units done, while the phase lasts."""


@contextmanager
def silent(phase: str, total: int, *, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Says nothing."""
    yield lambda n: None


@contextmanager
def progress(phase: str, total: int, *, unit: str = "B", quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to call with every number of bytes (or other units) done; safe to call from several threads."""
    if quiet:
        yield lambda n: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=phase, unit=unit, unit_scale=unit == "B", file=sys.stderr) as bar:

            def tick(n: int) -> None:
                bar.update(n)

            yield tick
    else:
        yield _Lines(phase, total, unit).add


class _Lines:
    def __init__(self, phase: str, total: int, unit: str) -> None:
        self.phase, self.total, self.unit = phase, total, unit
        self.done = 0
        self.begin = self.last = monotonic()
        self.lock = Lock()

    def add(self, n: int) -> None:
        with self.lock:
            self.done += n
            now = monotonic()
            if now - self.last < LINE_EVERY:
                return
            self.last = now
            rate = self.done / (now - self.begin)
            left = (self.total - self.done) / rate if rate else 0
            done = f"{self.text(self.done)} of {self.text(self.total)}"
            print(f"{self.phase}: {done}, {self.text(rate)}/s, {left:.0f} s left", file=sys.stderr)

    def text(self, amount: float) -> str:
        """Bytes in their units, anything else counted."""
        return size_text(amount) if self.unit == "B" else f"{amount:.4g}{self.unit}"
