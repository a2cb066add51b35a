"""Progress on stderr: a bar on a terminal, one line per half minute elsewhere, nothing when asked for quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic

from mtp_convert.summary import size_text

LINE_EVERY = 30.0  # seconds


@contextmanager
def progress(phase: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to call with every number of bytes done; safe to call from several threads."""
    if quiet:
        yield lambda n: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=phase, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr) as bar:

            def tick(n: int) -> None:
                bar.update(n)

            yield tick
    else:
        yield _Lines(phase, total).add


class _Lines:
    def __init__(self, phase: str, total: int) -> None:
        self.phase, self.total = phase, total
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
            done = f"{size_text(self.done)} of {size_text(self.total)}"
            print(f"{self.phase}: {done}, {size_text(rate)}/s, {left:.0f} s left", file=sys.stderr)
