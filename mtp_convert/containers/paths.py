"""Opening what a checkpoint names: regular files below its own folder, nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mtp_convert.errors import ConvertError, Problem

LONGEST_NAME = 255  # of one file or folder


def member_path(folder: Path, name: object, where: str) -> Path:
    """The file `name` that a checkpoint file `where` refers to, directly or below `folder`.

    A symbolic link may lead into the `blobs` folders of the Hub cache that the folder is in, nowhere else outside.

    Raises:
        ConvertError: MTP015.
    """
    text = name if isinstance(name, str) else repr(name)
    parts = Path(text).parts
    bad = not isinstance(name, str) or not parts or not text.isprintable() or ".." in parts or Path(text).is_absolute()
    bad = bad or max(map(len, parts)) > LONGEST_NAME
    if not bad:
        path = folder / text
        bases = [folder.resolve(), *_blobs(folder.resolve())]
        try:
            real = path.resolve(strict=False)
        except (OSError, RuntimeError):  # a loop of links
            real = Path("/")
        if any(real.is_relative_to(b) for b in bases):
            return path
    raise ConvertError(
        "MTP015",
        Problem(f"refers to {text!r}", where, expected="a file name inside the folder"),
        hint="do not use this checkpoint: an honest tool does not write such names",
    )


def _blobs(folder: Path) -> list[Path]:
    """Where a Hub cache keeps the files of `CACHE/REPOSITORY/snapshots/COMMIT/...`: of one repository, or of all."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots":
            repository = path.parent.parent
            return [repository / "blobs", repository.parent / "blobs"]
    return []


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file (a FIFO or device in its place would block or mislead)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ConvertError("MTP002", Problem("no such file", str(path))) from error
    except OSError as error:
        raise ConvertError("MTP042", Problem(error.strerror or str(error), str(path))) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConvertError("MTP002", Problem("not a regular file", str(path)))
    return fd
