"""Reads and lays out safetensors folders: one file or shards with `model.safetensors.index.json`.

The format is a length, a JSON header and one block of bytes. The header is parsed here because the engine needs byte
positions; every rule of the format is checked, and duplicate names (which the reference reader accepts) are refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from mtp_convert.containers.base import MOST_DIMENSIONS, Place, Shape, Stored, StoredChunk, StoredTensor, usable_name
from mtp_convert.containers.paths import member_path, open_regular
from mtp_convert.encodings.dtype import BY_NAME, UNREAD
from mtp_convert.errors import ConvertError, Problem

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 25_000_000  # the Hub refuses larger ones
OPENING = 32  # bytes; the length of the header, or what shows that this is another kind of file
_HINTS = {
    b"version https://git-lfs": "this is a git-LFS pointer, not the file; run `git lfs pull` or `hf download`",
    b"<!DOCTYPE": "this is an HTML page, not the file; download it again",
    b"<html": "this is an HTML page, not the file; download it again",
}


class _Duplicate(ValueError):
    """A name stands twice in one JSON object."""


def read(folder: Path) -> Stored:
    """Everything that a safetensors folder, or one file, holds, from headers alone.

    Raises:
        ConvertError: MTP002 nothing there, MTP010 a damaged file, MTP011 a damaged index, MTP012 a name in two files.
    """
    if folder.is_file():
        return stored(folder.parent, {folder: read_file(folder)})
    index_path, single = folder / INDEX, folder / SINGLE
    weight_map: dict[str, str] | None = None
    warnings: list[str] = []
    if index_path.is_file():
        weight_map = index(member_path(folder, INDEX, str(folder)))
        names = sorted(set(weight_map.values()))
        if single.is_file() and SINGLE not in names:
            raise ConvertError(
                "MTP011",
                Problem(f"both {SINGLE} and an index that does not name it", str(folder)),
                hint="nobody can say which is meant; remove one of them",
            )
    elif single.is_file():
        names = [SINGLE]
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(names) != 1:
            found = f"{len(names)} .safetensors files and no {INDEX}" if names else "no .safetensors file"
            raise ConvertError("MTP002", Problem(found, str(folder)))
    paths = [member_path(folder, n, INDEX) for n in names]
    if missing := [p for p in paths if not p.is_file()]:
        raise ConvertError(
            "MTP011",
            [Problem("shard is missing", p.name, expected=f"named by {INDEX}") for p in missing],
            hint="download the missing files, or the whole folder again",
        )
    if weight_map is not None:
        stale = sorted({p.name for p in folder.glob("*.safetensors")} - set(names))
        warnings += [f"{name} is not in {INDEX} and is not read" for name in stale]
    return stored(folder, {path: read_file(path) for path in paths}, weight_map, warnings)


Header = tuple[bytes, dict[str, StoredTensor]]  # as it is stored, and the tensors that it describes


def stored(
    folder: Path,
    headers: Mapping[Place, Header],
    weight_map: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> Stored:
    """What files with these headers hold together, wherever the files lie.

    Raises:
        ConvertError: MTP011 headers and index disagree, MTP012 a name in two files.
    """
    tensors = _joined(headers)
    if weight_map is not None:
        _agree(weight_map, tensors)
    raw = {place.name: header for place, (header, _) in headers.items()}
    return Stored("safetensors", folder, tensors, files=tuple(headers), headers=raw, warnings=tuple(warnings))


def index(path: Path) -> dict[str, str]:
    """The shard of every tensor, as an index file says.

    Raises:
        ConvertError: MTP011.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        weight_map = data["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError("weight_map is not a table of file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConvertError(
            "MTP011",
            Problem(f"not a usable index: {error}", path.name),
            hint="download the file again",
        ) from error
    return weight_map


def _joined(headers: Mapping[Place, Header]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    twice: list[Problem] = []
    for place, (_, found) in headers.items():
        for name, tensor in found.items():
            if name in tensors:
                other = tensors[name].chunks[0].path.name
                twice.append(Problem(f"{name} is stored twice", f"{other} and {place.name}"))
            tensors[name] = tensor
    if twice:
        raise ConvertError("MTP012", twice, hint="remove the shard of the older save")
    return tensors


def _agree(weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    problems = [
        Problem(f"{n} is not in the shard that the index names", shard)
        for n, shard in weight_map.items()
        if n not in tensors or tensors[n].chunks[0].path.name != Path(shard).name
    ]
    problems += [
        Problem(f"{n} is not in the index", tensors[n].chunks[0].path.name) for n in tensors.keys() - weight_map.keys()
    ]
    if problems:
        raise ConvertError("MTP011", problems, hint="index and shards come from different saves")


def read_file(path: Path) -> Header:
    """The raw header and the tensors of one file."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        raw = os.pread(fd, header_length(path, os.pread(fd, OPENING, 0), size), 8)
    finally:
        os.close(fd)
    return raw, tensors_of(path, raw, size)


def header_length(place: Place, opening: bytes, size: int) -> int:
    """Bytes of the header of a file of `size` bytes that begins with `opening`.

    Raises:
        ConvertError: MTP010.
    """
    length: int = struct.unpack_from("<Q", opening)[0] if len(opening) >= 8 else 0
    if not 2 <= length <= min(size - 8, LARGEST_HEADER):
        hint = next((h for magic, h in _HINTS.items() if opening.startswith(magic)), "")
        raise _damaged(place, f"header of {length} bytes in a file of {size}", hint)
    return length


def tensors_of(place: Place, raw: bytes, size: int | None) -> dict[str, StoredTensor]:
    """The tensors that a raw header describes, where a file of `size` bytes has them (None: any size).

    Raises:
        ConvertError: MTP010.
    """
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(place, f"the header is not JSON: {error}") from error
    return _tensors(place, header, 8 + len(raw), size)


def described(name: str, raw: bytes) -> dict[str, StoredTensor]:
    """What the raw header of a file says, without the file: names, types and shapes of tensors that hold no bytes."""
    return {n: replace(t, chunks=()) for n, t in tensors_of(Path(name), raw, None).items()}


def _tensors(path: Place, header: object, base: int, size: int | None) -> dict[str, StoredTensor]:
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    _refuse_unread(path, header)
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise _damaged(path, "__metadata__ is not a table of texts")
            continue
        tensor, begin, end = _entry(path, name, entry, base)
        ranges.append((begin, end, name))
        tensors[name] = tensor
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise _damaged(
                path,
                f"bytes of {name!r} overlap another tensor or leave a hole at {min(begin, at)}",
            )
        at = end
    if size is not None and base + at != size:
        raise _damaged(path, f"file has {size} bytes, its header describes {base + at}")
    return tensors


def _refuse_unread(path: Place, header: Mapping[str, Any]) -> None:
    """Element types that the format has and this package has not.

    Raises:
        ConvertError: MTP031.
    """
    types = {n: e["dtype"] for n, e in header.items() if isinstance(e, dict) and isinstance(e.get("dtype"), str)}
    found = [Problem(f"{name[:80]!r}: unknown type", path.name, t) for name, t in types.items() if t in UNREAD]
    if found:
        raise ConvertError("MTP031", found, hint="the file is whole; releases store such codes as U8")


def _entry(path: Place, name: str, entry: Any, base: int) -> tuple[StoredTensor, int, int]:  # noqa: ANN401
    """One tensor, and its byte range in the data block."""
    if not usable_name(name):
        raise _damaged(path, f"unusable name {name[:80]!r}")
    try:
        dtype, shape = BY_NAME[entry["dtype"]], _shape(entry["shape"])
        begin, end = _shape(entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"unusable entry {name!r}: {error}") from error
    if end - begin != prod(shape) * dtype.itemsize:
        raise _damaged(path, f"{name!r} has {end - begin} bytes, {dtype} {list(shape)} needs another number")
    return StoredTensor(name, dtype, shape, (StoredChunk((0,) * len(shape), shape, path, base + begin),)), begin, end


def _shape(value: object) -> Shape:
    if (
        not isinstance(value, list)
        or len(value) > MOST_DIMENSIONS
        or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62 for v in value)
    ):
        raise TypeError("not a list of sizes")
    return tuple(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _Duplicate(f"name stands twice: {twice!r}")
    return found


def _damaged(place: Place, what: str, hint: str = "") -> ConvertError:
    return ConvertError("MTP010", Problem(what, place.name), hint=hint or "download the file again")


def header_bytes(tensors: Sequence[tuple[str, str, Shape, int]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header for (name, dtype, shape, nbytes) in storage order, padded so that data starts 8-aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-(len(raw)) % 8)
