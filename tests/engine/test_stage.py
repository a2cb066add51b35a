"""A target folder is absent or complete: after errors, interrupts, kills, and with other runs around."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_convert.engine import stage as module
from mtp_convert.engine.stage import staged
from mtp_convert.errors import ConvertError

HOLD = """
import sys, time
from pathlib import Path
from mtp_convert.engine.stage import staged
with staged(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.readline()
"""
# Writes generation after generation over the same target until it is killed.
GENERATIONS = """
import sys
from itertools import count
from pathlib import Path
from mtp_convert.engine.files import Literal, OutFile
from mtp_convert.engine.runner import write_files
from mtp_convert.engine.stage import staged
print("ready", flush=True)
for i in count(int(sys.argv[2])):
    files = [OutFile(f"d/{n}", [Literal(bytes([i % 251]) * 70_000)]) for n in range(4)]
    with staged(Path(sys.argv[1]), force=True) as stage:
        write_files(files, stage, threads=2)
        (stage / "last").write_bytes(bytes([i % 251]))
"""


def start(script: str, *args: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def nothing() -> None: ...


def write(target: Path, text: str, *, force: bool = False, then: Callable[[], object] = nothing) -> None:
    """Stage a folder with one file, and do something before the end."""
    with staged(target, force=force) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text(text)
        then()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def text(target: Path) -> str:
    return (target / "sub" / "file").read_text()


def test_the_target_appears_at_the_end_with_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged(target) as stage:
        (stage / "f").write_text("x")
        assert not target.exists()
    assert names(target.parent) == ["out"]
    assert names(target) == ["f"]


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143), ConvertError("MTP041", "x")]
)
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", "x", then=raising(error))
    assert names(tmp_path) == []


def test_an_existing_folder_is_kept_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target, seen = tmp_path / "out", []
    write(target, "old")
    with pytest.raises(RuntimeError):
        write(target, "new", force=True, then=raising(RuntimeError()))
    assert text(target) == "old"
    write(target, "new", force=True, then=lambda: seen.append(text(target)))
    assert seen == ["old"]
    assert text(target) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        write(target, "old")
    else:
        target.write_text("old")
    with pytest.raises(ConvertError, match="already exists") as caught, staged(target):
        pytest.fail("must not start")
    assert (caught.value.code, caught.value.exit_code) == ("MTP073", 73)
    assert "--force" in caught.value.hint
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert text(tmp_path / "out") == "new"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def appear() -> None:
        target.mkdir()
        (target / "theirs").write_text("x")

    with pytest.raises(ConvertError, match="appeared while this run was writing") as caught:
        write(target, "x", then=appear)
    assert caught.value.code == "MTP073"
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_failing_rename_brings_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "out", Path.rename
    write(target, "old")

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConvertError, match="Input/output error"):
        write(target, "new", force=True)
    assert text(target) == "old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_noticed_before_and_while_writing(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="not enough free space") as caught, staged(tmp_path / "a", needed=1 << 60):
        pytest.fail("must not start")
    assert (caught.value.code, caught.value.exit_code) == ("MTP040", 6)
    with pytest.raises(ConvertError, match="No space left") as caught, staged(tmp_path / "b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code == "MTP040"
    assert "free some space" in caught.value.hint
    assert names(tmp_path) == []


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConvertError) as caught, staged(tmp_path / "file" / "out"):
        pytest.fail("must not start")
    assert caught.value.code == "MTP040"


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, sync = Path.rename, module._sync
    monkeypatch.setattr(module, "_sync", lambda p: events.append(f"sync {p.name}") or sync(p))
    monkeypatch.setattr(Path, "rename", lambda self, to: events.append("rename") or rename(self, to))
    write(tmp_path / "out", "x")
    published = events.index("rename")
    assert {"sync file", "sync sub", "sync .out.partial"} <= set(events[:published])
    assert events[published + 1 :] == [f"sync {tmp_path.name}"]


def test_two_runs_at_once(tmp_path: Path) -> None:
    child = start(HOLD, str(tmp_path / "out"))
    try:
        with pytest.raises(ConvertError, match="another run is writing") as caught:
            write(tmp_path / "out", "x")
        assert (caught.value.code, caught.value.exit_code) == ("MTP075", 75)
        assert (tmp_path / ".out.partial").is_dir()  # the other run's stage is untouched
        write(tmp_path / "other", "x")  # another target is free
    finally:
        end(child)
    write(tmp_path / "out", "y")  # a dead owner holds nothing
    assert names(tmp_path) == ["other", "out"]


def test_a_lock_file_that_was_removed_meanwhile_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner removes it between our opening and our locking: a lock on a removed file protects nothing."""
    lock, opened = tmp_path / ".out.lock", os.open
    first = [True]

    def late(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = opened(path, flags, mode)
        if path == lock and first:
            first.pop()
            lock.unlink()
        return fd

    monkeypatch.setattr(os, "open", late)
    with staged(tmp_path / "out"):
        assert lock.exists()
        with pytest.raises(ConvertError, match="another run"):
            write(tmp_path / "out", "x")


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["sub"]


@pytest.mark.parametrize("seed", range(8))
def test_kill_at_any_time(tmp_path: Path, seed: int) -> None:
    target, rng = tmp_path / "out", random.Random(seed)
    child = start(GENERATIONS, str(target), str(seed))
    time.sleep(rng.random() * 0.08)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if target.exists():
        assert names(target) == ["d", "last"]
        generation = (target / "last").read_bytes()
        assert {(target / "d" / str(n)).read_bytes() for n in range(4)} == {generation * 70_000}
    shutil.rmtree(target, ignore_errors=True)
    write(target, "next")
    assert text(target) == "next"
    assert names(tmp_path) == ["out"]
