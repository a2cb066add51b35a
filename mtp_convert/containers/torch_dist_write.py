"""The framing of torch_dist files, written without torch: what stands around the bytes of a tensor, and `.metadata`.

An item is what `torch.save` writes for one contiguous tensor: a zip of stored members with the structure as a pickle
and the raw bytes. Its reader is `torch.load`, which does not look at the checksum of the bytes (0 here: they are not
known when the frame is made). Tests let torch, torch.distributed.checkpoint and Megatron-Core read the result.
"""

from __future__ import annotations

import struct
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from mtp_convert.containers.base import Shape
from mtp_convert.containers.pickle_write import Call, Global, Made, Pairs, Persistent, dumps
from mtp_convert.containers.torch_zip import STORAGES, contiguous
from mtp_convert.encodings.dtype import BY_NAME, DType

ALIGN = 64  # torch aligns payloads to this inside an item
_CLASSES = {torch_name: storage for storage, torch_name in STORAGES.items()}
_BIG = 0xFFFFFFFF
_DCP = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


class Frame(NamedTuple):
    """Bytes around a tensor's payload."""

    prefix: bytes
    suffix: bytes


class Entry(NamedTuple):
    """A stored item: chunk offset (None for an object), its sizes, and where it lies."""

    offset: Shape | None
    sizes: Shape
    file: str
    start: int
    length: int


@lru_cache(maxsize=65536)
def frame(dtype: DType, shape: Shape) -> Frame:
    """What stands before and after the bytes of a contiguous tensor."""
    return _zip([("data.pkl", dumps(_tensor(dtype, shape)))], prod(shape) * dtype.itemsize)


def save_object(value: object) -> bytes:
    """torch.save of a structure without tensor bytes (plain containers, `Namespace`, empty tensors)."""
    frame = _zip([("data.pkl", dumps(_plain(value)))], 0)
    return frame.prefix + frame.suffix


def extra_state() -> bytes:
    """What TransformerEngine 2 stores for a module without FP8 state, as Megatron stores objects: in a list."""
    return save_object([_tensor(BY_NAME["U8"], (0,))])


def _plain(value: object) -> object:
    """Namespaces become records of their class."""
    if isinstance(value, Namespace):
        return Made(Global("argparse", "Namespace"), {k: _plain(v) for k, v in vars(value).items()})
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def _tensor(dtype: DType, shape: Shape) -> Call:
    """The record of a contiguous tensor over storage `0`."""
    elements = prod(shape)
    known = _CLASSES.get(dtype.torch_name)
    storage = Global("torch", known) if known else Global("torch.storage", "UntypedStorage")
    count = elements if known else elements * dtype.itemsize
    hooks = Call(Global("collections", "OrderedDict"), ())
    args = (Persistent(("storage", storage, "0", "cpu", count)), 0, shape, contiguous(shape), False, hooks)
    if known:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", dtype.torch_name)))


def _zip(members: list[tuple[str, bytes]], payload: int) -> Frame:
    """A zip of stored members: `members`, torch's small ones, and `data/0` of `payload` bytes (left out)."""
    members = [*members, ("byteorder", b"little")]
    prefix, directory = b"", b""
    for name, data in members:
        directory += _central(name, zlib.crc32(data), len(data), len(prefix))
        prefix += _local(name, zlib.crc32(data), len(data)) + data
    directory += _central("data/0", 0, payload, len(prefix))
    prefix += _local("data/0", 0, payload, at=len(prefix))
    at, version = len(prefix) + payload, b"3\n"
    directory += _central("version", zlib.crc32(version), len(version), at)
    tail = _local("version", zlib.crc32(version), len(version)) + version
    return Frame(prefix, tail + directory + _end(len(members) + 2, len(directory), at + len(tail)))


def _local(name: str, crc: int, size: int, *, at: int | None = None) -> bytes:
    """A local header; with `at` it is padded so that the data after it is aligned."""
    path = f"archive/{name}".encode()
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= _BIG else b""
    if at is not None:
        pad = -(at + 30 + len(path) + len(extra) + 4) % ALIGN
        extra += b"FB" + struct.pack("<H", pad) + b"Z" * pad  # torch's own padding field
    short = min(size, _BIG)
    return (
        struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0x800, 0, 0, 33, crc, short, short, len(path), len(extra))
        + path
        + extra
    )


def _central(name: str, crc: int, size: int, at: int) -> bytes:
    path = f"archive/{name}".encode()
    values = ([size, size] if size >= _BIG else []) + ([at] if at >= _BIG else [])
    extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    short = min(size, _BIG)
    head = (b"PK\1\2", 45, 45, 0x800, 0, 0, 33, crc, short, short, len(path), len(extra), 0, 0, 0, 0, min(at, _BIG))
    return struct.pack("<4s6H3L5H2L", *head) + path + extra


def _end(count: int, size: int, at: int) -> bytes:
    """The end records; the zip64 ones only where a position needs them."""
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, min(at, _BIG), 0)
    if at < _BIG:
        return end
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
    return end64 + struct.pack("<4sLQL", b"PK\6\7", 0, at + size, 1) + end


def metadata_bytes(
    tensors: Mapping[str, tuple[DType, Shape]], entries: Mapping[str, Sequence[Entry]], objects: Sequence[str]
) -> bytes:
    """The `.metadata` pickle of torch.distributed.checkpoint for these tensors and objects."""
    fields = {
        "state_dict_metadata": Pairs(_described(tensors, entries, objects)),
        "planner_data": None,
        "storage_data": Pairs(_stored([*tensors, *objects], entries)),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return dumps(Made(Global(_DCP, "Metadata"), fields))


def _described(
    tensors: Mapping[str, tuple[DType, Shape]], entries: Mapping[str, Sequence[Entry]], objects: Sequence[str]
) -> Iterator[tuple[object, object]]:
    """What every entry is."""
    for name, (dtype, shape) in tensors.items():
        boxes = [{"offsets": _size(e.offset or ()), "sizes": _size(e.sizes)} for e in entries[name]]
        chunks = [Made(Global(_DCP, "ChunkStorageMetadata"), box) for box in boxes]
        state = {"properties": _properties(dtype), "size": _size(shape), "chunks": chunks}
        yield name, Made(Global(_DCP, "TensorStorageMetadata"), state)
    for name in objects:
        yield name, Made(Global(_DCP, "BytesStorageMetadata"))


def _stored(names: Sequence[str], entries: Mapping[str, Sequence[Entry]]) -> Iterator[tuple[object, object]]:
    """Where every chunk of every entry lies."""
    for name in names:
        for e in entries[name]:
            index = {"fqn": name, "index": None, "offset": None if e.offset is None else _size(e.offset)}
            yield Made(Global(_DCP, "MetadataIndex"), index), _info(e)


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def _info(entry: Entry) -> Made:
    return Made(_STORAGE_INFO, {"relative_path": entry.file, "offset": entry.start, "length": entry.length})


def _properties(dtype: DType) -> Made:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Call(Global(_DCP, "_MEM_FORMAT_ENCODING"), (0,))
    state = (Global("torch", dtype.torch_name), layout, False, memory, False)
    return Made(Global(_DCP, "TensorProperties"), state)
