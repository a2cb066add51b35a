"""A Hugging Face Hub on 127.0.0.1 for the real client: enough of its protocol to create, upload, commit and read.

    with serve(tmp_path) as hub:
        hub.add_model("me/m", folder)            # put in without the client
        hub.fault("POST", "/commit/", status=503)
        run_process("push", folder, "me/m", **hub.env)
        hub.files("me/m", "main"), hub.commits("me/m", "main"), hub.requests

Three ways to store large files: LFS, LFS in parts (`part_size`), Xet (`xet`, into a folder). The account is `me`; the
tokens are hf_test_rw and hf_test_ro, any other is refused. huggingface_hub reads its environment when it is imported:
give `hub.env` to a new process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from _handler import Handler
from _store import LFS_FROM, Commit, Fault, Repo, Request, Store


class LoopbackHub:
    """The running server, from the side of a test."""

    def __init__(self, store: Store, port: int, xet: bool) -> None:
        self.store = store
        self.endpoint = f"http://127.0.0.1:{port}"
        self.xet = xet

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to use this Hub and nothing else."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_test_rw",
            "HF_HOME": str(self.store.folder / "home"),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    @property
    def requests(self) -> list[Request]:
        """Every request so far, oldest first."""
        return self.store.requests

    def fault(self, method: str, pattern: str, times: int = 1, **what: Any) -> Fault:  # noqa: ANN401 - fields of `Fault`
        """Let the next `times` matching requests go wrong; see `Fault`."""
        fault = Fault(method, pattern, times, **what)
        self.store.faults.append(fault)
        return fault

    def add_model(self, repo: str, folder: Path | None = None, *, private: bool = False, gated: bool = False) -> str:
        """A repository with the files of a folder; returns its commit."""
        with self.store.lock:
            made = self.store.create(repo, private=private)
            made.gated = gated
            if folder is None:
                return made.refs["main"]
            tree = dict(made.commits[made.refs["main"]].tree)
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = path.relative_to(folder).as_posix()
                tree[name] = self.store.entry(name, path.read_bytes())
            return self.store.commit(made, "main", "add files", tree, made.refs["main"])

    def put(self, repo: str, path: str, data: bytes, rev: str = "main") -> str:
        """A commit of somebody else's that writes one file."""
        with self.store.lock:
            found = self.repo(repo)
            head = found.refs[rev]
            tree = {**found.commits[head].tree, path: self.store.entry(path, data)}
            return self.store.commit(found, rev, f"put {path}", tree, head)

    def repo(self, repo: str) -> Repo:
        """The repository's own record."""
        return self.store.repos[repo]

    def head(self, repo: str, rev: str = "main") -> str:
        """The commit of a revision."""
        found = self.repo(repo).resolve(rev)
        assert found, f"no revision {rev}"
        return found

    def files(self, repo: str, rev: str = "main") -> dict[str, str]:
        """sha256 of every file, by path."""
        tree = self.repo(repo).commits[self.head(repo, rev)].tree
        return {p: e.sha256 or hashlib.sha256(e.data or b"").hexdigest() for p, e in tree.items()}

    def data(self, repo: str, path: str, rev: str = "main") -> bytes:
        """The bytes of one file (not of one that is stored by Xet)."""
        entry = self.repo(repo).commits[self.head(repo, rev)].tree[path]
        return entry.data if entry.data is not None else (self.store.blobs / entry.sha256).read_bytes()

    def commits(self, repo: str, rev: str = "main") -> list[Commit]:
        """Newest first; the last one is the repository's own."""
        return self.store.history(self.repo(repo), rev)

    def count(self, method: str, part: str) -> int:
        """How often a method was used on a path that holds `part`."""
        return sum(r.method == method and part in r.path for r in self.requests)


@contextmanager
def serve(
    folder: Path, *, xet: bool = False, part_size: int | None = None, lfs_from: int = LFS_FROM
) -> Iterator[LoopbackHub]:
    """A Hub that keeps its blobs in `folder` and ends with the block.

    Args:
        part_size: bytes of a part of an LFS upload; None uploads in one piece.
        lfs_from: bytes from which on any file is a large one.
    """
    store = Store(Path(folder) / "hub", part_size=part_size, lfs_from=lfs_from)
    own = type("OwnHandler", (Handler,), {"store": store, "xet": xet})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield LoopbackHub(store, server.server_port, xet)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
