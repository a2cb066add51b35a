"""What the loopback Hub keeps: repositories with commits and refs, blobs by digest, faults to inject, a request log."""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from threading import RLock

ROLES = {"hf_test_rw": "write", "hf_test_ro": "read"}
ACCOUNT = "me"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".distcp")
LFS_FROM = 10 << 20  # bytes; a larger file is never a plain git blob


@dataclass(frozen=True)
class Entry:
    """One file of a tree: a git blob with its bytes, or a large file that is stored under its sha256."""

    size: int
    data: bytes | None = None
    sha256: str = ""

    @property
    def oid(self) -> str:
        """The git object id; that of the pointer file for a large file."""
        data = self.data
        if data is None:
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                self.size,
            )
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Tree = dict[str, Entry]


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    tree: Tree


@dataclass
class Pull:
    title: str
    status: str = "draft"


@dataclass
class Repo:
    private: bool
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branches and refs/pr/N
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, of a pull request, or of the beginning of a commit id."""
        name = revision.removeprefix("refs/heads/")
        if name in self.refs:
            return self.refs[name]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches.

    status: answered instead of doing the work, with `message`. drop_after: bytes of the body after which the
    connection ends, of the request (PUT, POST) or of the answer (GET). lose_answer: the work is done, then `status` is
    answered or the connection ends. lose_file: a commit forgets this path. skip: matching requests still served.
    """

    method: str
    pattern: str
    times: int = 1
    status: int | None = None
    message: str = "injected"
    drop_after: int | None = None
    delay: float = 0.0
    retry_after: int | None = None
    lose_answer: bool = False
    lose_file: str = ""
    skip: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if not self.times or method != self.method or not re.search(self.pattern, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Request:
    """One request as the server saw it. status 0: the connection ended without an answer."""

    method: str
    path: str
    range: str = ""
    received: int = 0  # bytes of its body
    sent: int = 0  # bytes of the answer's body
    status: int = 0
    hit: bool = False  # by a fault


class Store:
    """Everything that the server knows. Blobs are files named by their sha256 below `folder`."""

    def __init__(self, folder: Path, *, part_size: int | None, lfs_from: int) -> None:
        self.folder = folder
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.part_size, self.lfs_from = part_size, lfs_from
        self.lock = RLock()
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._numbers = count(1)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((f for f in self.faults if f.takes(method, path)), None)

    def create(self, name: str, *, private: bool) -> Repo:
        """A repository with its first commit, as the real one makes it."""
        repo = self.repos[name] = Repo(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit(repo, "main", "initial commit", {".gitattributes": Entry(len(attributes), attributes)}, None)
        return repo

    def commit(self, repo: Repo, ref: str, title: str, tree: Tree, parent: str | None) -> str:
        """A new commit at the tip of a ref."""
        sha = hashlib.sha1(f"{next(self._numbers)} {parent} {title}".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, tree)
        repo.refs[ref] = sha
        return sha

    def is_large(self, path: str, size: int) -> bool:
        return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= self.lfs_from)

    def entry(self, path: str, data: bytes) -> Entry:
        """A file put in by the server itself."""
        if not self.is_large(path, len(data)):
            return Entry(len(data), data)
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return Entry(len(data), None, digest)

    def history(self, repo: Repo, revision: str) -> list[Commit]:
        """Newest first."""
        found, sha = [], repo.resolve(revision)
        while sha:
            found.append(repo.commits[sha])
            sha = found[-1].parent
        return found

    def xet_hashes(self) -> dict[str, str]:
        """sha256 -> Xet hash, from the shard files of the `local://` storage that the client itself writes."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob("xet/**/*.mdb")):
            found |= _shard_hashes(path.read_bytes())
        return found


def ignored(tree: Tree, path: str) -> bool:
    """Whether the repository's .gitignore names the file."""
    rules = tree[".gitignore"].data if ".gitignore" in tree else None
    return any(fnmatch(path, rule) for rule in (rules or b"").decode().split())


ROW, HEADER = 48, 48  # bytes of every record, and of what comes before the first
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


def _shard_hashes(raw: bytes) -> dict[str, str]:
    """One metadata shard: files, each with its segments, optional digests of them, and an optional sha256."""
    found, at = {}, HEADER
    while at + ROW <= len(raw) and raw[at : at + 32] != b"\xff" * 32:
        file_hash, (flags, segments) = raw[at : at + 32], struct.unpack_from("<II", raw, at + 32)
        at += ROW * (1 + segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            found[_words(raw[at : at + 32])] = _words(file_hash)
            at += ROW
    return found


def _words(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
