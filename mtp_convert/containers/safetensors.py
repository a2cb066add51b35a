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

from mtp_convert.containers.base import MOST_DIMENSIONS, Shape, Stored, StoredChunk, StoredTensor, usable_name
from mtp_convert.containers.paths import member_path, open_regular
from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.errors import ConvertError, Problem

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 25_000_000  # the Hub refuses larger ones
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
        headers, tensors = _shards([folder])
        return Stored("safetensors", folder.parent, tensors, files=(folder,), headers=headers)
    index_path, single = folder / INDEX, folder / SINGLE
    weight_map: dict[str, str] | None = None
    warnings: list[str] = []
    if index_path.is_file():
        weight_map = _index(member_path(folder, INDEX, str(folder)))
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
    headers, tensors = _shards(paths)
    if weight_map is not None:
        _agree(weight_map, tensors)
        stale = sorted({p.name for p in folder.glob("*.safetensors")} - set(names))
        warnings += [f"{name} is not in {INDEX} and is not read" for name in stale]
    return Stored(
        "safetensors",
        folder,
        tensors,
        files=tuple(paths),
        headers=headers,
        warnings=tuple(warnings),
    )


def _index(path: Path) -> dict[str, str]:
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


def _shards(paths: Sequence[Path]) -> tuple[dict[str, bytes], dict[str, StoredTensor]]:
    headers: dict[str, bytes] = {}
    tensors: dict[str, StoredTensor] = {}
    twice: list[Problem] = []
    for path in paths:
        raw, found = read_file(path)
        headers[path.name] = raw
        for name, tensor in found.items():
            if name in tensors:
                other = tensors[name].chunks[0].path.name
                twice.append(Problem(f"{name} is stored twice", f"{other} and {path.name}"))
            tensors[name] = tensor
    if twice:
        raise ConvertError("MTP012", twice, hint="remove the shard of the older save")
    return headers, tensors


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


def read_file(path: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """The raw header and the tensors of one file."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise _damaged(path, f"header of {length} bytes in a file of {size}", fd)
        raw = os.pread(fd, length, 8)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"the header is not JSON: {error}", fd) from error
    finally:
        os.close(fd)
    return raw, _tensors(path, header, 8 + length, size)


def described(name: str, raw: bytes) -> dict[str, StoredTensor]:
    """What the raw header of a file says, without the file: names, types and shapes of tensors that hold no bytes."""
    path = Path(name)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not JSON: {error}") from error
    return {n: replace(t, chunks=()) for n, t in _tensors(path, header, 0, None).items()}


def _tensors(path: Path, header: object, base: int, size: int | None) -> dict[str, StoredTensor]:
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
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


def _entry(path: Path, name: str, entry: Any, base: int) -> tuple[StoredTensor, int, int]:  # noqa: ANN401
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


def _damaged(path: Path, what: str, fd: int | None = None) -> ConvertError:
    first = os.pread(fd, 32, 0) if fd is not None else b""
    hint = next((h for magic, h in _HINTS.items() if first.startswith(magic)), "download the file again")
    return ConvertError("MTP010", Problem(what, path.name), hint=hint)


def header_bytes(tensors: Sequence[tuple[str, str, Shape, int]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header for (name, dtype, shape, nbytes) in storage order, padded so that data starts 8-aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-(len(raw)) % 8)
