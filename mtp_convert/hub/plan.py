"""What a push changes: the files here with their digests, those on the Hub, and the difference; nothing is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from mtp_convert import fsck
from mtp_convert.containers import safetensors, torch_dist
from mtp_convert.containers.paths import member_path
from mtp_convert.engine.runner import WINDOW, Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import CARRIED, LATEST, PROVENANCE

THREADS = 4  # files that are read at once
LARGEST_BLOB = 64 << 20  # bytes; the Hub stores no larger file as a plain git blob
SKIPPED_FOLDERS = (".git", ".cache")
WEIGHTS = (".safetensors", safetensors.INDEX.removeprefix("model"), ".distcp")
RIVALS = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # what loaders may take instead
MARKS = (LATEST, torch_dist.METADATA)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to be on the Hub: its path there, its content or where that lies, and its digests (hexadecimal).

    git_oid: its id as a git blob; empty where it is too large to be one.
    """

    path: str
    source: Path | bytes
    size: int
    sha256: str
    git_oid: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the Hub; sha256 is empty for a plain git blob, whose digest is `git_oid`."""

    size: int
    git_oid: str
    sha256: str = ""

    def equals(self, file: LocalFile) -> bool:
        """Whether it has the same bytes."""
        digests = (self.sha256, file.sha256) if self.sha256 else (self.git_oid, file.git_oid)
        return self.size == file.size and digests[0] == digests[1]


@dataclass(frozen=True)
class Changes:
    """Paths by what happens to them; `kept` are files of the Hub that the push does not speak of."""

    new: tuple[str, ...]
    changed: tuple[str, ...]
    same: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def sent(self) -> tuple[str, ...]:
        """What has to be uploaded."""
        return (*self.new, *self.changed)

    @property
    def none(self) -> bool:
        """The Hub has it all already."""
        return not (self.new or self.changed or self.deleted)


def gather(folder: Path, *, instead: Mapping[str, bytes], progress: Progress | None = None) -> dict[str, LocalFile]:
    """Every file of a converted folder, by path, read once: for its digests, and to check it against its own record.

    Args:
        instead: contents that are made for the upload, by path; they replace files of the folder.

    Raises:
        ConvertError: MTP002 the folder has no record, MTP061 it is not as it was written, MTP015 a link leads outside.
    """
    recorded = fsck.recorded(folder)
    paths = sorted(_paths(folder))
    problems = [Problem("file is missing", name) for name in recorded if name not in paths]
    extra = [p for p in paths if p not in recorded and p.endswith((".safetensors", ".distcp"))]
    problems += [
        Problem("weights that the conversion did not write", p) for p in extra if not p.startswith(f"{CARRIED}/")
    ]
    found = {path: _made(path, content) for path, content in instead.items()}
    todo = [path for path in paths if path not in found]
    with ThreadPoolExecutor(THREADS) as pool:
        for file, digest in pool.map(lambda path: _read(folder, path, progress), todo):
            found[file.path] = file
            if file.path in recorded and recorded[file.path] != (file.size, digest):
                problems.append(Problem("other content than was written", file.path))
    if problems:
        raise ConvertError("MTP061", problems)
    return dict(sorted(found.items()))


def _paths(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if relative.parts[0] not in SKIPPED_FOLDERS and path.is_file():
            yield relative.as_posix()


def _made(path: str, content: bytes) -> LocalFile:
    return LocalFile(path, content, len(content), hashlib.sha256(content).hexdigest(), _git(len(content), [content]))


def _git(size: int, blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _read(folder: Path, path: str, progress: Progress | None) -> tuple[LocalFile, str]:
    """The file and the digest that `mtp_convert.json` would record for it."""
    source = member_path(folder, path, folder.name)
    size, windows, sha256 = source.stat().st_size, [], hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= LARGEST_BLOB else None
    with source.open("rb") as f:
        while block := f.read(WINDOW):
            windows.append(xxhash.xxh3_128_digest(block))
            sha256.update(block)
            if git is not None:
                git.update(block)
            if progress:
                progress(len(block))
    recorded = xxhash.xxh3_128_hexdigest(b"".join(windows or [xxhash.xxh3_128_digest(b"")]))
    return LocalFile(path, source, size, sha256.hexdigest(), git.hexdigest() if git else ""), recorded


def compare(here: Mapping[str, LocalFile], there: Mapping[str, RemoteFile], pushed: Iterable[str]) -> Changes:
    """What has to happen so that the Hub has what is here and no weights besides.

    Args:
        pushed: payload files that an earlier push recorded there.
    """
    new = tuple(p for p in here if p not in there)
    same = tuple(p for p, f in here.items() if p in there and there[p].equals(f))
    known = {*new, *same}
    deleted = stale(here, there, pushed)
    kept = tuple(sorted(there.keys() - here.keys() - set(deleted)))
    return Changes(new, tuple(p for p in here if p not in known), same, deleted, kept)


def stale(here: Iterable[str], there: Iterable[str], pushed: Iterable[str]) -> tuple[str, ...]:
    """Files of another checkpoint that would stay beside this one, and that a loader could take for a part of it.

    Those are: weights and their indices in a folder that gets weights or got them from an earlier push, and the rest of
    a Megatron checkpoint that an earlier push put there. Anything else of the repository is not ours.
    """
    here, pushed = set(here), set(pushed)
    own = {_folder(p) for p in pushed}
    folders = own | {_folder(p) for p in here if p.endswith(WEIGHTS)}
    found = set()
    for path in set(there) - here:
        name, folder = PurePosixPath(path).name, _folder(path)
        rival = folder in folders and (name.endswith(WEIGHTS) or name in RIVALS)
        if path in pushed or rival or folder in own - {"."} or (pushed and name in MARKS):
            found.add(path)
    if LATEST in found:
        found |= {p for p in set(there) - here if p.startswith(f"{CARRIED}/")}
    return tuple(sorted(found))


def _folder(path: str) -> str:
    return PurePosixPath(path).parent.as_posix()


def recorded_payload(raw: bytes) -> frozenset[str]:
    """The payload files that an `mtp_convert.json` names; none where it cannot be read."""
    try:
        return frozenset(map(str, json.loads(raw)["files"]))
    except (ValueError, KeyError, TypeError):
        return frozenset()


def differing(here: Mapping[str, LocalFile], deleted: Iterable[str], there: Mapping[str, RemoteFile]) -> list[Problem]:
    """Where a revision is not what it has to be: every file here with its bytes, and nothing of `deleted`."""
    problems = [Problem("still there", path) for path in deleted if path in there]
    for path, file in here.items():
        found = there.get(path)
        if found is None:
            problems.append(Problem("not there", path, expected=f"{file.size} bytes"))
        elif not found.equals(file):
            problems.append(
                Problem(
                    "other content", path, found.sha256 or found.git_oid, file.sha256 if found.sha256 else file.git_oid
                )
            )
    return problems


def overwritten(changes: Changes, there: Mapping[str, RemoteFile]) -> list[str]:
    """Weights on the Hub that no push put there, and that this one would replace or remove."""
    if PROVENANCE in there:
        return []
    return [p for p in (*changes.changed, *changes.deleted) if p.endswith(WEIGHTS) or p.endswith(RIVALS)]
