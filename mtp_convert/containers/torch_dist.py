"""Reads folders of torch.distributed.checkpoint: which chunk of which tensor lies where.

Megatron's `torch_dist` has a metadata.json beside `.metadata`. A folder without one ("dcp") was written by torch alone:
Megatron's `fsdp_dtensor` and `torch_dcp`, whose names are those of `state_dict`.

`.metadata` is a pickle of plain facts; it is read with stand-ins and then checked like any other untrusted input:
types, chunk boxes (inside the tensor, no overlap, no hole), file names, byte ranges, and the header of every item.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_convert.containers import torch_zip
from mtp_convert.containers.base import MOST_DIMENSIONS, Shape, Stored, StoredChunk, StoredTensor, usable_name
from mtp_convert.containers.paths import member_path, open_regular
from mtp_convert.containers.safe_pickle import LARGEST_PICKLE, Inert, read_pickle
from mtp_convert.encodings.dtype import BY_TORCH_NAME, DType
from mtp_convert.errors import ConvertError, Problem

if TYPE_CHECKING:
    from mtp_convert.containers.remote import Ranges

METADATA = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
MEGATRON_FILE = "metadata.json"
ARGUMENTS = "args"  # the object that holds the training arguments where there is no common state
STATE = "._extra_state"  # ends the names of a module's state, which is no weight whatever its type
# Entries of a training run that are no weights: optimizer, learning-rate schedule, random and data states.
TRAINING_STATE = (
    "optimizer.",
    "opt_param_scheduler",
    "chained_",
    "rng_state",
    "rerun_state_machine",
    "dataloader",
    "tokenizer",
    "lr_scheduler",
    "common_state/",
    "train_state",
)


@dataclass(frozen=True, slots=True)
class Item:
    """Where one entry lies: file, first byte, length."""

    path: Path
    start: int
    length: int


def read(folder: Path, *, away: Mapping[Path, Ranges] | None = None) -> Stored:
    """Everything that the checkpoint in `folder` holds, from headers alone.

    Args:
        away: payload files that are not here. The headers inside of them are not read: `.metadata` is believed, and
            nothing can be read of their tensors.

    Raises:
        ConvertError: MTP013 damaged, MTP014 a pickle that asks for code, MTP015 a path outside the folder.
    """
    meta = _metadata(folder)
    problems: list[Problem] = []
    entries = meta.get("state_dict_metadata")
    items = dict(_items(folder, meta, problems))
    if not isinstance(entries, dict):
        raise _damaged("no state_dict_metadata", METADATA)
    sizes = _file_sizes(items, away or {}, problems)
    _fail(problems)
    reader = _ItemReader(away or {})
    tensors: dict[str, StoredTensor] = {}
    objects: set[str] = set()
    training: set[str] = set()
    try:
        for name, entry in entries.items():
            if not usable_name(name) or not isinstance(entry, Inert):
                problems.append(Problem(f"entry {_shown(name)} has no usable name or description", METADATA))
            elif name.startswith(TRAINING_STATE):
                training.add(name)
            elif entry.cls.endswith("BytesStorageMetadata") or name.endswith(STATE):
                objects.add(name)
            else:
                tensor = _tensor(name, entry, items, sizes, reader, problems)
                if tensor is not None:
                    tensors[name] = tensor
        _fail(problems)
        common = _common(folder, items, reader)
    finally:
        reader.close()
    files = tuple(sorted({i.path for i in items.values()}))
    container = "torch_dist" if (folder / MEGATRON_FILE).is_file() else "dcp"
    return Stored(container, folder, tensors, frozenset(objects), frozenset(training), common, files)


def _metadata(folder: Path) -> Inert:
    path = folder / METADATA
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > LARGEST_PICKLE:
            raise _damaged(f"{size} bytes are no checkpoint metadata", METADATA)
        data = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    meta = read_pickle(data, METADATA)
    if not isinstance(meta, Inert) or not meta.cls.endswith("Metadata"):
        raise _damaged("holds no checkpoint metadata", METADATA)
    return meta


def _items(folder: Path, meta: Inert, problems: list[Problem]) -> Iterator[tuple[tuple[str, Shape | None], Item]]:
    """The byte range of every (name, chunk offset)."""
    storage = meta.get("storage_data")
    if not isinstance(storage, dict):
        raise _damaged("no storage_data", METADATA)
    paths: dict[object, Path] = {}
    for index, info in storage.items():
        if not isinstance(index, Inert) or not isinstance(info, Inert):
            raise _damaged("storage_data is not a table of byte ranges", METADATA)
        name, offset = index.get("fqn"), index.get("offset")
        start, length, relative = info.get("offset"), info.get("length"), info.get("relative_path")
        if not usable_name(name):
            raise _damaged(f"storage_data for the name {_shown(name)}", METADATA)
        if not isinstance(relative, str):
            raise _damaged(f"{name}: unusable file name {_shown(relative)}", METADATA)
        if relative not in paths:
            paths[relative] = member_path(folder, relative, METADATA)
        place = None if offset is None else _shape(offset)
        if not (_natural(start) and _natural(length)) or info.get("transform_descriptors"):
            problems.append(Problem(f"{name}: unusable byte range", METADATA, f"{_shown(start)}+{_shown(length)}"))
        elif place is None and offset is not None:
            problems.append(Problem(f"{name}: unusable chunk offset", METADATA, _shown(offset)))
        else:
            yield (name, place), Item(paths[relative], start, length)


def _file_sizes(items: Mapping[Any, Item], away: Mapping[Path, Ranges], problems: list[Problem]) -> dict[Path, int]:
    """Sizes of all files; a missing or short file is reported once."""
    sizes: dict[Path, int] = {}
    needed: dict[Path, int] = {}
    for item in items.values():
        needed[item.path] = max(needed.get(item.path, 0), item.start + item.length)
    for path, end in needed.items():
        if path not in away and not path.is_file():
            problems.append(Problem("file is missing", path.name, expected=f"{end} bytes"))
            continue
        sizes[path] = away[path].size if path in away else path.stat().st_size
        if sizes[path] < end:
            problems.append(Problem("file is truncated", path.name, f"{sizes[path]} bytes", f"at least {end}"))
    return sizes


def _tensor(
    name: str,
    entry: Inert,
    items: Mapping[tuple[str, Shape | None], Item],
    sizes: Mapping[Path, int],
    reader: _ItemReader,
    problems: list[Problem],
) -> StoredTensor | None:
    shape, dtype = _shape(entry.get("size")), _dtype(entry.get("properties"))
    boxes = _boxes(entry.get("chunks"))
    if shape is None or dtype is None or boxes is None:
        problems.append(Problem(f"{name}: unusable shape, dtype or chunks", METADATA))
        return None
    chunks = []
    for offset, size in boxes:
        item = items.get((name, offset)) or items.get((name, None))
        if item is None:
            problems.append(Problem(f"{name}: chunk at {offset} is stored nowhere", METADATA))
            return None
        start = reader.payload(item, name, dtype, size, problems)
        chunks.append(StoredChunk(offset, size, item.path, start))
    if not _tiles(shape, chunks):
        problems.append(Problem(f"{name}: chunks overlap or leave a hole in shape {shape}", METADATA))
        return None
    return StoredTensor(name, dtype, shape, tuple(chunks))


def _boxes(chunks: object) -> list[tuple[Shape, Shape]] | None:
    """Offsets and sizes of all chunks, None when any is unusable."""
    if not isinstance(chunks, list):
        return None
    boxes = []
    for chunk in chunks:
        offset, size = (
            (_shape(chunk.get(n)) for n in ("offsets", "sizes")) if isinstance(chunk, Inert) else (None, None)
        )
        if offset is None or size is None:
            return None
        boxes.append((offset, size))
    return boxes


class _ItemReader:
    """Reads item headers through one descriptor per file."""

    def __init__(self, away: Mapping[Path, Ranges]) -> None:
        self._away = away
        self._fds: dict[Path, int] = {}

    def fd(self, path: Path) -> int:
        if path not in self._fds:
            self._fds[path] = open_regular(path)
        return self._fds[path]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def structure(self, item: Item, name: str) -> tuple[Any, dict[str, torch_zip.Member]]:
        """The pickled structure of an item and its members."""
        if (ranges := self._away.get(item.path)) is not None:
            with tempfile.TemporaryFile() as file:
                file.writelines(ranges.blocks(item.start, item.start + item.length))
                file.flush()
                return self._structure(file.fileno(), Item(item.path, 0, item.length), name)
        return self._structure(self.fd(item.path), item, name)

    def _structure(self, fd: int, item: Item, name: str) -> tuple[Any, dict[str, torch_zip.Member]]:
        try:
            found = torch_zip.members(fd, item.start, item.length)
            return torch_zip.read_structure(fd, found, f"{item.path.name} ({name})"), found
        except torch_zip.Damaged as error:
            raise torch_zip.damaged(error, name, item.path.name) from error

    def payload(self, item: Item, name: str, dtype: DType, sizes: Shape, problems: list[Problem]) -> int:
        """File position of a chunk's first element; a disagreement with `.metadata` is a problem."""
        if item.path in self._away:
            return item.start
        stub, found = self.structure(item, name)
        try:
            at = torch_zip.locate(stub, found)
        except torch_zip.Damaged as error:
            problems.append(Problem(f"{name}: {error}", item.path.name))
            return 0
        if at.dtype != dtype or at.shape != sizes:
            problems.append(Problem(name, item.path.name, f"{at.dtype} {list(at.shape)}", f"{dtype} {list(sizes)}"))
        return at.start


def _common(folder: Path, items: Mapping[tuple[str, Shape | None], Item], reader: _ItemReader) -> dict[str, object]:
    """The non-tensor state: common.pt when it exists (as Megatron prefers), else the common_state object or `args`."""
    path = folder / COMMON_FILE
    if path.is_file():
        state, _ = reader.structure(Item(path, 0, path.stat().st_size), COMMON_FILE)
    elif (COMMON_OBJECT, None) in items:
        state, _ = reader.structure(items[(COMMON_OBJECT, None)], COMMON_OBJECT)
        state = state[0] if isinstance(state, list) and state else state
    elif (ARGUMENTS, None) in items:
        state = {"args": reader.structure(items[(ARGUMENTS, None)], ARGUMENTS)[0]}
    else:
        return {}
    if not isinstance(state, dict):
        raise _damaged(f"holds a {type(state).__name__}, not a dict", COMMON_FILE)
    args = state.get("args")
    return {**state, "args": dict(vars(args)) if hasattr(args, "__dict__") else {}}


def _tiles(shape: Shape, chunks: list[StoredChunk]) -> bool:
    """Whether the chunks cover the shape exactly once: inside, same volume, and no two overlap."""
    for c in chunks:
        if len(c.offset) != len(shape) or any(o + n > s for o, n, s in zip(c.offset, c.sizes, shape, strict=True)):
            return False
    filled = [c for c in chunks if prod(c.sizes)]
    if sum(prod(c.sizes) for c in filled) != prod(shape):
        return False
    # Volumes agree, so a hole means an overlap.
    return len({c.offset for c in filled}) == len(filled) and not any(_overlap(a, b) for a, b in _neighbours(filled))


def _neighbours(chunks: list[StoredChunk]) -> Iterator[tuple[StoredChunk, StoredChunk]]:
    """Pairs that share rows of dimension 0 (all others cannot overlap)."""
    ordered = sorted(chunks, key=lambda c: c.offset)
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if a.offset and b.offset[0] >= a.offset[0] + a.sizes[0]:
                break
            yield a, b


def _overlap(a: StoredChunk, b: StoredChunk) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a.offset, a.sizes, b.offset, b.sizes, strict=True))


def _shape(value: object) -> Shape | None:
    if isinstance(value, tuple) and len(value) <= MOST_DIMENSIONS and all(_natural(v) for v in value):
        return value
    return None


def _shown(value: object) -> str:
    """An untrusted value in a message: plain ones as they are, anything else by its type."""
    return repr(value)[:80] if isinstance(value, (str, int, type(None))) else f"a {type(value).__name__}"


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _dtype(properties: object) -> DType | None:
    if not isinstance(properties, Inert):
        return None
    state = properties.state
    name = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    return BY_TORCH_NAME.get(name) if isinstance(name, str) else None


def _damaged(what: str, where: str) -> ConvertError:
    return ConvertError("MTP013", Problem(what, where), hint="the file is damaged; copy it again")


def _fail(problems: list[Problem]) -> None:
    if problems:
        raise ConvertError("MTP013", problems, hint="the checkpoint is incomplete or damaged; copy it again")
