"""A repository at one commit, and its files in the standard cache of huggingface_hub.

A branch or tag is resolved once; whatever is read later is read at that commit. What is in the cache is not asked for
again, and with HF_HUB_OFFLINE=1 nothing is asked for at all.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from time import sleep
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub import session
from mtp_convert.hub.faults import fault
from mtp_convert.hub.ranges import ATTEMPTS, FIRST_PAUSE, HubFile
from mtp_convert.hub.source import LOOKED_AT, HubName
from mtp_convert.summary import size_text

CONNECTS = 2  # to resolve a name; it may be a mistyped path, and nobody waits long to be told


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit.

    folder: where fetched files lie, in the standard cache. files: bytes of every file of the repository, by path; as
    far as the cache knows them, where the Hub cannot be asked.
    """

    name: HubName
    commit: str
    folder: Path
    files: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.name.repo}@{self.commit}"

    def has(self, path: str) -> bool:
        """Whether a file has been fetched."""
        return (self.folder / path).is_file()

    def remote(self, path: str) -> HubFile:
        """A file that stays on the Hub, to be read by byte ranges."""
        return HubFile(self.name.repo, self.commit, path, self.files[path])


class _Silent(tqdm):  # type: ignore[type-arg]
    """A bar that is not shown."""

    def __init__(self, *args: Any, **given: Any) -> None:  # noqa: ANN401 - the bar's own arguments
        given.pop("name", None)
        super().__init__(*args, **{**given, "disable": True})


def pin(name: HubName) -> Snapshot:
    """Resolve a name to a commit, list its files, and fetch the small ones that describe the model.

    Raises:
        ConvertError: exit code 7 for a repository or revision that is not there or not open to this user, for the
            network, and for offline mode where the cache does not have it.
    """
    folder = _fetched(name, name.revision, LOOKED_AT, silent=True, connects=CONNECTS)
    return Snapshot(name, folder.name, folder, _listed(name, folder))


def fetch(snapshot: Snapshot, paths: Iterable[str]) -> None:
    """Bring files into the cache; an interrupted download is continued.

    Raises:
        ConvertError: as `pin`.
    """
    wanted = [p for p in paths if not snapshot.has(p)]
    if not wanted:
        return
    shown = sys.stderr.isatty()
    if not shown:
        size = size_text(sum(snapshot.files.get(p, 0) for p in wanted))
        print(f"downloading {snapshot}: {len(wanted)} files, {size}", file=sys.stderr)
    if offline():
        raise not_cached(snapshot.name, wanted)
    _fetched(snapshot.name, snapshot.commit, wanted, silent=not shown)
    if absent := [p for p in wanted if not snapshot.has(p)]:
        raise ConvertError("MTP052", [Problem(f"{p} is not there", str(snapshot)) for p in absent])


def not_cached(name: HubName, paths: Collection[str] = ()) -> ConvertError:
    """Some files of a repository, or all of it, are not in the cache and may not be asked for."""
    problems = [Problem(f"{path} of {name} is not in the cache") for path in paths]
    hint = f"unset HF_HUB_OFFLINE, or run `hf download {name.repo}` first"
    return ConvertError("MTP056", problems or Problem(f"{name} is not in the cache"), hint=hint)


def offline() -> bool:
    """Whether the Hub may not be asked."""
    return bool(constants.HF_HUB_OFFLINE)


def _fetched(
    name: HubName, revision: str | None, paths: Collection[str], *, silent: bool, connects: int = ATTEMPTS
) -> Path:
    """The folder of a revision in the cache, with these of its files that exist.

    connects: how often a Hub is asked that does not answer at all.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return Path(
                snapshot_download(
                    name.repo,
                    revision=revision,
                    allow_patterns=[escape(p) for p in paths],
                    library_name="mtp-convert",
                    tqdm_class=_Silent if silent else None,
                )
            )
        except session.BROKEN as error:
            # huggingface_hub looks into the cache when the Hub does not answer; the cause is why it did.
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            if offline():
                raise not_cached(name) from error
            cause = cause if isinstance(cause, Exception) else error
            most = ATTEMPTS if isinstance(cause, HfHubHTTPError) else connects
            if not session.passes(cause) or attempt >= most:
                raise fault(cause, str(name)) from error
            sleep(session.asked_pause(cause) or FIRST_PAUSE * 2 ** (attempt - 1))
    raise AssertionError  # the last attempt has returned or raised


def _listed(name: HubName, folder: Path) -> Mapping[str, int]:
    """Bytes of every file at the commit of a cache folder."""
    here = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    try:
        if (known := session.known_tree(name.repo, folder.name)) is not None:
            return known
        if offline():
            return here
        tree = HfApi().list_repo_tree(name.repo, recursive=True, revision=folder.name)
        return {f.path: f.size for f in tree if hasattr(f, "size")}
    except session.BROKEN as error:
        raise fault(error, str(name)) from error
