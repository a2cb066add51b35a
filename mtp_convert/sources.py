"""Opens what SRC names: a folder, or a repository on the Hub with as few of its bytes as the command needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mtp_convert.checkpoint import Checkpoint, open_checkpoint
from mtp_convert.containers import remote, safetensors, torch_dist
from mtp_convert.containers.base import Place, Stored, StoredTensor
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub.source import SCHEME, HubName, Needed, needed, parse
from mtp_convert.location import LATEST, Located, locate

if TYPE_CHECKING:
    from mtp_convert.hub.fetch import Snapshot

# What comes here of a repository: descriptions and headers; what is carried along, and the payload that is read; all.
Extent = Literal["headers", "ranges", "files"]


def open_source(
    src: str | Path,
    *,
    extent: Extent = "files",
    layout: str | None = None,
    hf_config: str | Path | None = None,
    allow_unmapped: bool = False,
    scratch: Path | None = None,
) -> Checkpoint:
    """Open a folder, or a repository by `org/name`, `org/name@rev` or `hf://org/name[@rev]`.

    Args:
        src, hf_config: what `hub.source.parse` understands, else paths.
        extent: what of a repository comes here now; payload that does not is read when it is needed, or not at all
            ("headers" of a Megatron checkpoint).
        scratch: folder for payload that is read by byte ranges, until the process ends.

    Raises:
        ConvertError: as `open_checkpoint`; exit code 7 for the Hub and the network.
    """
    config = None if hf_config is None else _config(str(hf_config))
    name = parse(str(src))
    if name is None:
        return open_checkpoint(Path(src), layout=layout, hf_config=config, allow_unmapped=allow_unmapped)
    from mtp_convert.hub.fetch import fetch

    snapshot = _pinned(name, str(src))
    files = _needed(snapshot)
    _check_complete(snapshot, files)
    if files.megatron and (extent == "ranges" or not files.describing):
        extent = "files"  # where a tensor begins is said inside of the files
    fetch(snapshot, {"headers": files.describing, "ranges": files.side, "files": (*files.side, *files.weights)}[extent])
    folder, away = snapshot.folder, [f for f in files.weights if not snapshot.has(f)]
    read: Callable[[], Stored] | None = None
    if not away or files.megatron:
        located = locate(folder)
        if away:
            read = partial(torch_dist.read, located.weights, away={folder / f: snapshot.remote(f) for f in away})
    else:
        located = Located(folder, folder, folder, folder, "hf", "safetensors")
        read = partial(remote.read, folder, _places(snapshot, files, scratch))
    located = replace(located, given=Path(str(name)), pinned=str(snapshot))
    return open_checkpoint(located, read=read, layout=layout, hf_config=config, allow_unmapped=allow_unmapped)


def _config(text: str) -> Path:
    """A config.json or the folder of one; of a repository, everything that is carried along."""
    name = parse(text)
    if name is None:
        return Path(text)
    from mtp_convert.hub.fetch import fetch

    snapshot = _pinned(name, text)
    fetch(snapshot, _needed(snapshot).side)
    return snapshot.folder


def _pinned(name: HubName, text: str) -> Snapshot:
    """The repository; where a path could have been meant, an error says both."""
    from mtp_convert.hub.fetch import pin

    try:
        return pin(name)
    except ConvertError as error:
        if text.startswith(SCHEME):
            raise
        raise ConvertError(error.code, (Problem(f"no folder {text} here"), *error.problems), hint=error.hint) from error


def _needed(snapshot: Snapshot) -> Needed:
    index, tracker = snapshot.folder / safetensors.INDEX, snapshot.folder / LATEST
    shards = safetensors.index(index).values() if index.is_file() else ()
    text = tracker.read_text(encoding="utf-8", errors="replace") if tracker.is_file() else None
    return needed(snapshot.files, frozenset(shards), text)


def _check_complete(snapshot: Snapshot, files: Needed) -> None:
    """Refuse before anything is moved what no download would complete.

    Raises:
        ConvertError: MTP002 no weights, MTP011 shards that the repository does not have, MTP056 files that are not in
            the cache where nothing may be asked for.
    """
    from mtp_convert.hub.fetch import not_cached, offline

    away = [f for f in files.weights if not snapshot.has(f)]
    if away and offline():
        raise not_cached(snapshot.name, away)
    if absent := [f for f in away if f not in snapshot.files]:
        problems = [Problem("shard is missing", f, expected=f"named by {safetensors.INDEX}") for f in absent]
        raise ConvertError("MTP011", problems, hint="the repository is incomplete")
    several = len(files.weights) > 1 and not files.megatron and not snapshot.has(safetensors.INDEX)
    if not files.weights or several:
        found = f"{len(files.weights)} .safetensors files and no {safetensors.INDEX}"
        raise ConvertError("MTP002", Problem(found, str(snapshot)))


def _places(snapshot: Snapshot, files: Needed, scratch: Path | None) -> list[Place]:
    """Where the shards are: in the cache or on the Hub."""
    return [
        snapshot.folder / f if snapshot.has(f) else remote.RemoteFile(snapshot.remote(f), scratch=scratch)
        for f in files.weights
    ]


def compared(source: Checkpoint) -> Iterator[StoredTensor]:
    """The stored tensors that have to be equal before anything is written."""
    for name in sorted(source.copies):
        yield from (source.tensor(name), source.tensor(source.layout.home[source.layout.copies[name]][0].tensor))


def bring(tensors: Iterable[StoredTensor], *, quiet: bool = False) -> None:
    """Fetch what tensors hold on the Hub, with progress; nothing happens where all of it is here."""
    from mtp_convert.progress import progress

    spans = remote.absent(tensors)
    if spans:
        with progress("fetching", sum(stop - start for _, (start, stop) in spans), quiet=quiet) as tick:
            remote.fetch(spans, tick)
