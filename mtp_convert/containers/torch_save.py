"""Writes what `torch.save` writes, without torch: a zip of stored members with a pickle and the bytes of tensors.

Only what stands around the bytes of tensors is made here, so that they can be streamed into place. The reader is
`torch.load`, which does not look at their checksums (0 here: the bytes are not known when the zip is laid out).
"""

from __future__ import annotations

import struct
import zlib
from argparse import Namespace
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from mtp_convert.containers.base import Shape
from mtp_convert.containers.pickle_write import Call, Global, Made, Persistent, dumps
from mtp_convert.containers.torch_zip import STORAGES, contiguous
from mtp_convert.encodings.dtype import DType

ALIGN = 64  # torch aligns payloads to this inside a file
_CLASSES = {torch_name: storage for storage, torch_name in STORAGES.items()}
_BIG, _MANY = 0xFFFFFFFF, 0xFFFF  # from here on a size or position, or a count, stands in a zip64 record


class Frame(NamedTuple):
    """Bytes around a tensor's payload."""

    prefix: bytes
    suffix: bytes


@lru_cache(maxsize=65536)
def frame(dtype: DType, shape: Shape) -> Frame:
    """What stands before and after the bytes of a contiguous tensor."""
    return Frame(*archive(dumps(tensor(dtype, shape)), [prod(shape) * dtype.itemsize]))


def save_object(value: object) -> bytes:
    """torch.save of a structure without tensor bytes (plain containers, `Namespace`, empty tensors)."""
    return b"".join(archive(dumps(plain(value)), [0]))


def plain(value: object) -> object:
    """Namespaces become records of their class."""
    if isinstance(value, Namespace):
        return Made(Global("argparse", "Namespace"), {k: plain(v) for k, v in vars(value).items()})
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value


def tensor(dtype: DType, shape: Shape, storage: int = 0) -> Call:
    """The record of a contiguous tensor over a storage of its own, the `storage`-th."""
    elements = prod(shape)
    known = _CLASSES.get(dtype.torch_name)
    kind = Global("torch", known) if known else Global("torch.storage", "UntypedStorage")
    count = elements if known else elements * dtype.itemsize
    hooks = Call(Global("collections", "OrderedDict"), ())
    args = (Persistent(("storage", kind, str(storage), "cpu", count)), 0, shape, contiguous(shape), False, hooks)
    if known:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", dtype.torch_name)))


def archive(structure: bytes, payloads: Sequence[int]) -> list[bytes]:
    """The zip of a pickle and of storages with these sizes in bytes: what stands before every storage, and the end."""
    gaps, directory = [bytearray()], bytearray()
    at = 0
    for name, data in (("data.pkl", structure), ("byteorder", b"little")):
        at += _member(gaps[-1], directory, name, data, at)
    for number, size in enumerate(payloads):
        name = f"data/{number}"
        directory += _central(name, 0, size, at)
        header = _local(name, 0, size, at=at)
        gaps[-1] += header
        gaps.append(bytearray())
        at += len(header) + size
    at += _member(gaps[-1], directory, "version", b"3\n", at)
    gaps[-1] += directory + _end(len(payloads) + 3, len(directory), at)
    return [bytes(gap) for gap in gaps]


def _member(out: bytearray, directory: bytearray, name: str, data: bytes, at: int) -> int:
    """Append a member that is known already; its length with header."""
    checksum = zlib.crc32(data)
    directory += _central(name, checksum, len(data), at)
    record = _local(name, checksum, len(data)) + data
    out += record
    return len(record)


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
    """The end records; the zip64 ones only where a position or the count needs them."""
    few = min(count, _MANY)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, _BIG), min(at, _BIG), 0)
    if at < _BIG and count < _MANY:
        return end
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
    return end64 + struct.pack("<4sLQL", b"PK\6\7", 0, at + size, 1) + end
