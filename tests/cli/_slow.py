"""The command line with a conversion that takes a few seconds: every window of 4 KiB waits a moment.

Run as a script: `python _slow.py hf-to-megatron SRC DST`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtp_convert import progress
from mtp_convert.cli import main
from mtp_convert.engine import runner


@contextmanager
def slow(phase: str, total: int, *, unit: str = "B", quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """In the place of the progress bar."""
    yield lambda n: time.sleep(0.2)


if __name__ == "__main__":
    runner.WINDOW = 4096
    progress.progress = slow
    main()
