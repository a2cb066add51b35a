"""Shared fixtures."""

from __future__ import annotations

import os
import signal
import sys

# MKL sums in another order when memory is aligned otherwise; without this, equal bits depend on the allocator.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import pytest
import torch
from _kit import Cli, Outcome

from mtp_convert.cli import app
from mtp_convert.cli_errors import guarded

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in this process, with everything that the console script does around it."""
    for name in [n for n in os.environ if n.startswith("MTP_CONVERT_")]:
        monkeypatch.delenv(name)

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mtp-convert", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            guarded(app)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        streams = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0, streams.out, streams.err)

    return run
