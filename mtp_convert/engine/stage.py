"""An output folder is absent or complete, never half: written beside its place, then renamed.

lock `.<name>.lock`  ->  stage `.<name>.partial`  ->  files, fsync  ->  rename  ->  fsync of the parent
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_convert.errors import ConvertError, Problem


@contextmanager
def staged(target: Path, *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well and disappears when it does not.

    Args:
        force: replace an existing target, once the new one is complete.
        needed: bytes that will be written; refused at once if the disk has less.

    Raises:
        ConvertError: MTP073 exists, MTP075 locked, MTP040 not writable or full.
    """
    target = target.absolute()
    try:
        _refuse_existing(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot(error, target.parent) from error
    with _lock(target):
        _refuse_existing(target, force)
        stage = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            _enough_space(target, needed)
            yield stage
            _sync_tree(stage)
            _publish(stage, target, force)
        except OSError as error:
            raise _cannot(error, target) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force and not (target.is_dir() and not any(target.iterdir())):
        raise ConvertError(
            "MTP073",
            Problem("already exists", str(target)),
            hint="choose another folder, or --force to replace it",
        )


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    fd = _locked(path, target)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that it is nobody else's
        os.close(fd)


def _locked(path: Path, target: Path) -> int:
    """A locked descriptor of the lock file. Its last owner may have removed the file while we opened it: try again."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _cannot(error, path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise ConvertError(
                "MTP075", Problem("another run is writing", str(target)), hint="wait for it to end"
            ) from error
        os.close(fd)


def _enough_space(target: Path, needed: int) -> None:
    stat = os.statvfs(target.parent)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise ConvertError(
            "MTP040",
            Problem("not enough free space", str(target.parent), f"{free} bytes", f"{needed} bytes"),
            hint="free some space or choose another disk",
        )


def _sync_tree(folder: Path) -> None:
    """Put every file and folder entry on disk; data files were synced before, so this costs nothing for them."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(stage: Path, target: Path, force: bool) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise ConvertError("MTP073", Problem("appeared while this run was writing", str(target)))
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        stage.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _cannot(error: OSError, where: Path) -> ConvertError:
    hint = "free some space or choose another disk" if error.errno == errno.ENOSPC else "check the folder's permissions"
    return ConvertError("MTP040", Problem(error.strerror or str(error), str(where)), hint=hint)
