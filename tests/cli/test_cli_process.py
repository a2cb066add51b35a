"""What needs a process of its own: signals, locks, pipes, terminals, start-up."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _kit import AUTOMODEL, command, files_of, run_process

SOURCE = AUTOMODEL / "nemotron_d1"
SLOW = Path(__file__).parent / "_slow.py"


@contextmanager
def slow_conversion(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion in the middle of writing."""
    args = [sys.executable, str(SLOW), "hf-to-megatron", str(SOURCE), str(target)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 30
        while not any(target.parent.glob(f".{target.name}.partial/release/*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with slow_conversion(tmp_path / "out") as process:
        assert (tmp_path / ".out.lock").exists()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, "Traceback" in err) == (code, "", False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signal_is_reported(number: signal.Signals, word: str, tmp_path: Path) -> None:
    with slow_conversion(tmp_path / "out") as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert err == f"{word}: nothing unfinished can be seen; run the command again\n"


def test_signal_keeps_the_output_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with slow_conversion(tmp_path / "out") as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_run_does_not_stand_in_the_way(tmp_path: Path) -> None:
    with slow_conversion(tmp_path / "out") as process:
        process.kill()
        process.communicate(timeout=20)
    assert (tmp_path / ".out.partial").exists()
    assert run_process("hf-to-megatron", SOURCE, tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_second_run_is_locked_out(tmp_path: Path) -> None:
    with slow_conversion(tmp_path / "out") as process:
        second = run_process("hf-to-megatron", SOURCE, tmp_path / "out")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert second.code == 75
    assert second.err.startswith("error[MTP075]: locked: ")
    assert "\nhint: " in second.err
    assert list(tmp_path.iterdir()) == []


def without_reader(*args: object) -> tuple[int, str]:
    """Exit code and stderr of `mtp-convert ... | head -0`: stdout is closed before the first byte."""
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=30), err


@pytest.mark.parametrize(
    "args", [("plan", SOURCE, "--to", "megatron", "--format", "json"), ("families",), ("-h",)], ids=lambda a: a[0]
)
def test_reader_that_leaves_early(args: tuple[object, ...]) -> None:
    assert without_reader(*args) == (0, "")


def in_terminal(*args: object, **env: str) -> str:
    """Everything that a terminal would get."""
    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    process = subprocess.Popen(command(*args), stdout=theirs, stderr=theirs, env={**kept, "TERM": "xterm", **env})
    os.close(theirs)
    found = b""
    try:
        while select.select([ours], [], [], 30)[0]:
            found += os.read(ours, 65536)
    except OSError:
        pass  # Linux: the other end is closed
    os.close(ours)
    process.wait(timeout=30)
    return found.decode()


class TestColour:
    """Only for terminals, and only if they want it."""

    def test_terminal(self) -> None:
        assert "\x1b[" in in_terminal("inspect", SOURCE)

    def test_no_color(self) -> None:
        assert "\x1b" not in in_terminal("inspect", SOURCE, NO_COLOR="1")

    def test_dumb_terminal(self) -> None:
        assert "\x1b" not in in_terminal("inspect", SOURCE, TERM="dumb")

    @pytest.mark.parametrize("args", [("-h",), ("inspect",), ("inspect", "/nowhere")], ids=["help", "usage", "error"])
    def test_pipe(self, args: tuple[str, ...]) -> None:
        got = run_process(*args, TERM="xterm", COLORTERM="truecolor")
        assert "\x1b" not in got.out + got.err


class TestProcess:
    """The same conversion as a user starts it."""

    def test_conversion_both_ways(self, tmp_path: Path) -> None:
        there = run_process("hf-to-megatron", SOURCE, tmp_path / "m", MTP_CONVERT_FORMAT="quiet")
        assert (there.code, there.out, there.err) == (0, "", "")
        back = run_process("megatron-to-hf", tmp_path / "m", tmp_path / "hf")
        assert (back.code, back.err) == (0, "")
        given = files_of(SOURCE)
        assert all(given[n] == data for n, data in files_of(tmp_path / "hf").items())

    def test_refusal(self, tmp_path: Path) -> None:
        got = run_process("hf-to-megatron", tmp_path / "nowhere", tmp_path / "out")
        assert (got.code, got.out) == (3, "")
        assert got.err.startswith("error[MTP002]")

    def test_usage(self) -> None:
        assert run_process().code == 2
        assert run_process("inspect", SOURCE, "--frobnicate").code == 2

    def test_help_needs_no_torch(self) -> None:
        code = "import sys; import mtp_convert.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"
