"""An output folder against its own record: every file there, with its size and its digest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mtp_convert.containers.paths import member_path
from mtp_convert.engine.runner import WINDOW, Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import PROVENANCE
from mtp_convert.readable import Readable


@dataclass(frozen=True)
class FolderCheck(Readable):
    """The result: one line per damaged file."""

    path: str
    files: int
    nbytes: int
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        return {"schema_version": 1, "ok": not self.problems, **self.__dict__}


def recorded(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of every payload file, from mtp_convert.json.

    Raises:
        ConvertError: MTP002 there is no record, MTP013 it is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise ConvertError(
            "MTP002", Problem(f"no {PROVENANCE}", str(folder)), hint="only outputs of this tool have one"
        )
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: (int(f["bytes"]), str(f["xxh3_128_of_4mib"])) for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError("MTP013", Problem(f"unreadable record: {error}", str(path))) from error


def check_folder(folder: Path, *, progress: Progress | None = None) -> FolderCheck:
    """Read every recorded file and compare."""
    problems = []
    files = recorded(folder)
    for name, (size, digest) in files.items():
        path = member_path(folder, name, PROVENANCE)
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, recorded {size}")
        elif _digest(path, progress) != digest:
            problems.append(f"{name} has other content than recorded")
    return FolderCheck(str(folder), len(files), sum(size for size, _ in files.values()), problems)


def _digest(path: Path, progress: Progress | None) -> str:
    digests = []
    with path.open("rb") as f:
        while block := f.read(WINDOW):
            digests.append(xxhash.xxh3_128_digest(block))
            if progress:
                progress(len(block))
    return xxhash.xxh3_128_hexdigest(b"".join(digests or [xxhash.xxh3_128_digest(b"")]))
