"""Finds tensor bytes inside what `torch.save` writes (a zip of stored members) without loading it.

Layout of an item: archive/data.pkl (the structure), archive/data/<key> (one per storage, the raw bytes), a few small
members, the central directory. Only uncompressed members are accepted, and every range must lie inside the item.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from mtp_convert.containers.base import Shape
from mtp_convert.containers.safe_pickle import LARGEST_PICKLE, StorageType, TensorStub, read_pickle
from mtp_convert.encodings.dtype import BY_TORCH_NAME, DType
from mtp_convert.errors import ConvertError, Problem

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_TAIL = 4096  # holds the central directory of an item with one tensor

# torch's storage classes by element type; other types come as UntypedStorage with the dtype as a fifth argument
STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A stored zip member: absolute byte range in the file."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A contiguous tensor inside an item: absolute file position of element 0."""

    dtype: DType
    shape: Shape
    start: int


class Damaged(Exception):
    """The bytes are no item of torch.save; the message says what is off."""


def members(fd: int, start: int, length: int) -> dict[str, Member]:
    """The members of the zip in file range [start, start + length), names without the archive's folder."""
    try:
        return _members(fd, start, length)
    except (struct.error, OverflowError, StopIteration) as error:
        raise Damaged("zip records are cut short or out of range") from error


def _members(fd: int, start: int, length: int) -> dict[str, Member]:
    tail_len = min(_TAIL, length)
    tail = os.pread(fd, tail_len, start + length - tail_len)
    at = tail.rfind(b"PK\x05\x06")
    if len(tail) != tail_len or at < 0 or at + _END.size > len(tail):
        raise Damaged("no end record: truncated or not written by torch.save")
    _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        where = _LOCATOR.unpack_from(tail, locator)[2]
        end64 = os.pread(fd, _END64.size, start + where)
        if len(end64) != _END64.size or end64[:4] != b"PK\x06\x06":
            raise Damaged("bad zip64 end record")
        count, size, offset = _END64.unpack(end64)[7:]
    if offset + size > length:
        raise Damaged("central directory outside the item")
    in_tail = offset - (length - tail_len)
    directory = tail[in_tail : in_tail + size] if in_tail >= 0 else os.pread(fd, size, start + offset)
    entries = _entries(fd, start, length, directory, count)
    found = dict(entries)
    if len(found) != len(entries):
        raise Damaged("two members of one name")
    return found


def _entries(fd: int, start: int, length: int, directory: bytes, count: int) -> list[tuple[str, Member]]:
    found = []
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\x01\x02":
            raise Damaged("bad central directory")
        fields = _ENTRY.unpack_from(directory, at)
        method, packed, size, name_len, extra_len, comment_len = (fields[i] for i in (4, 8, 9, 10, 11, 12))
        local = fields[16]
        name = directory[at + _ENTRY.size : at + _ENTRY.size + name_len].decode("utf-8", "replace")
        extra = directory[at + _ENTRY.size + name_len : at + _ENTRY.size + name_len + extra_len]
        size, packed, local = _zip64(extra, size, packed, local)
        if method or packed != size:
            raise Damaged(f"compressed member {name!r}")
        inner = name.partition("/")[2]
        if inner in ("data.pkl", "byteorder") or inner.startswith("data/"):
            payload = _payload(fd, start, local)
            if payload + size > length:
                raise Damaged(f"member {name!r} outside the item")
            found.append((inner, Member(start + payload, size)))
        at += _ENTRY.size + name_len + extra_len + comment_len
    return found


def _zip64(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Sizes above 4 GiB stand in an extra field, in this order, only those that overflowed."""
    at = 0
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{n // 8}Q", extra, at + 4))
            size = next(values) if size == 0xFFFFFFFF else size
            packed = next(values) if packed == 0xFFFFFFFF else packed
            local = next(values) if local == 0xFFFFFFFF else local
        at += 4 + n
    return size, packed, local


def _payload(fd: int, start: int, local: int) -> int:
    header = os.pread(fd, _LOCAL.size, start + local)
    if len(header) != _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise Damaged("bad local header")
    fields = _LOCAL.unpack(header)
    return local + _LOCAL.size + int(fields[9]) + int(fields[10])


def read_structure(fd: int, found: dict[str, Member], where: str) -> Any:  # noqa: ANN401 - checked by callers
    """The pickled structure of an item, tensors as stand-ins."""
    return _structure(structure_bytes(fd, found), where)


def structure_bytes(fd: int, found: dict[str, Member]) -> bytes:
    """The pickle of an item."""
    member = found.get("data.pkl")
    if member is None:
        raise Damaged("no data.pkl")
    if member.size > LARGEST_PICKLE:
        raise Damaged(f"data.pkl of {member.size} bytes")
    order = found.get("byteorder")
    if order is not None and os.pread(fd, order.size, order.start) != b"little":
        raise Damaged("big-endian tensors are not supported")
    return os.pread(fd, member.size, member.start)


@lru_cache(maxsize=4096)  # tensors of one shape share their pickle byte for byte
def _structure(data: bytes, where: str) -> Any:  # noqa: ANN401
    return read_pickle(data, where)


def locate(stub: object, found: dict[str, Member]) -> TensorBytes:
    """Where the bytes of a contiguous tensor lie."""
    if not isinstance(stub, TensorStub):
        raise Damaged(f"holds a {type(stub).__name__}, not a tensor")
    storage, offset, size, stride, *typed = stub.args
    if not (isinstance(storage, tuple) and len(storage) >= 5 and isinstance(storage[1], StorageType)):
        raise Damaged("unknown storage record")
    dtype = BY_TORCH_NAME.get(str(typed[0]) if typed else STORAGES.get(storage[1], ""))
    member = found.get(f"data/{storage[2]}")
    if dtype is None or member is None:
        raise Damaged(f"unknown storage {storage[1]!r} or its bytes are missing")
    shape, strides = _ints(size), _ints(stride)
    if strides != contiguous(shape) and 0 not in shape:
        raise Damaged(f"not contiguous: size {shape}, stride {strides}")
    if not isinstance(offset, int) or offset < 0:
        raise Damaged("bad storage offset")
    if (offset + prod(shape)) * dtype.itemsize > member.size:
        raise Damaged("the tensor is larger than its bytes")
    return TensorBytes(dtype, shape, member.start + offset * dtype.itemsize)


def contiguous(shape: Shape) -> Shape:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _ints(value: object) -> Shape:
    if not isinstance(value, tuple) or not all(isinstance(v, int) and v >= 0 for v in value):
        raise Damaged("size or stride is not a tuple of numbers")
    return value


def damaged(error: Damaged, what: str, where: str) -> ConvertError:
    """The error that users see."""
    return ConvertError(
        "MTP013",
        Problem(f"{what}: {error}", where),
        hint="the file is damaged or truncated; copy it again",
    )
