"""`mtp-convert push` as a process: output, exit codes, a token that never shows, a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from _kit import command, run_process
from _push import REPO, TRANSPORTS, converted
from _server import LoopbackHub, serve

WAITS = ("--retry-wait", "0.01", "--retries", "2")


def matches(hub: LoopbackHub, folder: Path) -> bool:
    """Whether main holds every file of a folder (README.md is written on the way)."""
    import hashlib

    there = hub.files(REPO)
    return all(
        there.get(p.relative_to(folder).as_posix()) == hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).as_posix() != "README.md"
    )


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_push_by_command(tmp_path: Path, kind: str) -> None:
    folder = converted("megatron")
    with serve(tmp_path, **TRANSPORTS[kind]) as hub:  # type: ignore[arg-type]
        done = run_process("push", folder, REPO, "--format", "json", **hub.env)
        assert (done.code, done.err) == (0, "")
        assert done.data["commit"] == hub.head(REPO)
        assert matches(hub, folder)


def test_what_it_prints(tmp_path: Path) -> None:
    with serve(tmp_path) as hub:
        done = run_process("push", converted("hf"), REPO, "--dry-run", **hub.env)
        assert done.code == 0
        assert hub.store.repos == {}
        for words in ("would push to me/m", "private, new", "target        main", "new           10: README.md"):
            assert words in done.out
        assert "hf_test" not in done.out + done.err


SECRET = "hf_test_secret_token_of_somebody"


@pytest.mark.parametrize(
    ("env", "fault", "code", "debug"),
    [
        ({"HF_TOKEN": SECRET}, {"status": 403, "message": f"the token {SECRET} may not"}, "MTP051", False),
        ({"HF_TOKEN": SECRET}, {"status": 403, "message": f"the token {SECRET} may not"}, "MTP051", True),
        ({"HF_TOKEN": f"{SECRET}\x01"}, {}, "MTP051", True),
        ({"HF_TOKEN": SECRET, "HF_DEBUG": "1"}, {"status": 500}, "MTP054", True),
        ({"HF_TOKEN": SECRET, "HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "MTP055", False),
        ({"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}, {}, "MTP056", False),
    ],
    ids=["echoed", "echoed, debug", "malformed", "busy", "nobody", "offline"],
)
def test_a_token_is_never_printed(
    tmp_path: Path, env: dict[str, str], fault: dict[str, object], code: str, debug: bool
) -> None:
    with serve(tmp_path) as hub:
        if fault:
            hub.fault("GET", "", 99, **fault)
        words = ["--debug"] if debug else []
        done = run_process(*words, "push", converted("hf"), REPO, *WAITS, **{**hub.env, **env})
    assert SECRET not in done.out + done.err
    assert ("Traceback" in done.err) == debug
    if not debug:
        assert done.code == 7
        assert f"error[{code}]" in done.err


def test_a_kill_in_the_middle(tmp_path: Path) -> None:
    folder = converted("hf")
    with serve(tmp_path) as hub:
        hub.fault("POST", "/commit/main", delay=20)
        env = {**os.environ, **hub.env}
        running = subprocess.Popen(command("push", folder, REPO), env=env, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not hub.count("POST", "/commit/main") and time.monotonic() < until:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        sent = hub.count("PUT", "/_blob/")
        assert sent == 2
        assert len(hub.commits(REPO)) == 1
        hub.store.faults.clear()
        assert run_process("push", folder, REPO, **hub.env).code == 0
        assert hub.count("PUT", "/_blob/") == sent
        assert matches(hub, folder)


def test_usage(tmp_path: Path) -> None:
    with serve(tmp_path) as hub:
        both = run_process("push", converted("hf"), REPO, "--pr", "--branch", "x", **hub.env)
        name = run_process("push", converted("hf"), "a/b/c", **hub.env)
    assert (both.code, name.code) == (2, 2)
    assert "error[MTP001]" in name.err
