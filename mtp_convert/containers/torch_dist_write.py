"""The framing of torch_dist files: what stands before and after the bytes of a tensor, and the `.metadata` pickle.

The framing comes from torch.save itself, asked with an empty payload, so it is whatever the installed torch writes;
prefix + payload + suffix is checked once per process against torch.save of a real tensor.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mtp_convert.containers.base import Shape
from mtp_convert.encodings.dtype import BY_NAME, DType


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


class _Recorder:
    """A sink that keeps what torch writes and notes where it skips the payload."""

    def __init__(self) -> None:
        self.parts: list[bytes] = [b""]

    def write(self, data: Any) -> int:  # noqa: ANN401 - bytes or memoryview
        self.parts[-1] += bytes(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.parts.append(b"")
        return offset

    def flush(self) -> None:
        """Nothing is buffered."""


@lru_cache(maxsize=65536)
def frame(dtype: DType, shape: Shape) -> Frame:
    """What torch.save writes around a contiguous tensor of this type and shape."""
    _check_once()
    return _frame(dtype, shape)


def _frame(dtype: DType, shape: Shape) -> Frame:
    import torch
    from torch import serialization

    tensor = torch.empty(shape, dtype=dtype.torch())  # never touched: costs address space only
    if not tensor.numel():
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return Frame(buffer.getvalue(), b"")
    recorder = _Recorder()
    before = serialization.get_crc32_options()
    serialization.set_crc32_options(False)  # the checksum of bytes that torch has not seen would be wrong
    try:
        with serialization.skip_data():
            torch.save(tensor, recorder)  # type: ignore[arg-type]
    finally:
        serialization.set_crc32_options(before)
    prefix, suffix = recorder.parts
    return Frame(prefix, suffix)


@lru_cache(maxsize=1)
def _check_once() -> None:
    """Compare with torch.save; a torch that frames tensors otherwise must not go unnoticed.

    Raises:
        RuntimeError: prefix + payload + suffix is not what torch.save writes.
    """
    import torch
    from torch import serialization

    sample = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    buffer = io.BytesIO()
    before = serialization.get_crc32_options()
    serialization.set_crc32_options(False)
    try:
        torch.save(sample, buffer)
    finally:
        serialization.set_crc32_options(before)
    made = _frame(BY_NAME["F32"], (2, 3))
    if made.prefix + sample.numpy().tobytes() + made.suffix != buffer.getvalue():
        raise RuntimeError(f"torch {torch.__version__} frames tensors in a way this version does not know")


def save_bytes(value: object) -> bytes:
    """torch.save of a small object."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def extra_state() -> bytes:
    """What TransformerEngine 2 stores for a module without FP8 state, as Megatron stores objects: in a list."""
    import torch

    return save_bytes([torch.tensor([], dtype=torch.uint8)])


def metadata_bytes(
    tensors: Mapping[str, tuple[DType, Shape]],
    entries: Mapping[str, Sequence[Entry]],
    objects: Sequence[str],
) -> bytes:
    """The `.metadata` pickle of torch.distributed.checkpoint for these tensors and objects."""
    import torch
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for name, (dtype, shape) in tensors.items():
        chunks = []
        for e in entries[name]:
            offset = torch.Size(e.offset or ())
            chunks.append(m.ChunkStorageMetadata(offsets=offset, sizes=torch.Size(e.sizes)))
            storage[m.MetadataIndex(name, offset)] = _StorageInfo(e.file, e.start, e.length)
        properties = m.TensorProperties(dtype=dtype.torch())
        described[name] = m.TensorStorageMetadata(properties=properties, size=torch.Size(shape), chunks=chunks)
    for name in objects:
        (e,) = entries[name]
        described[name] = m.BytesStorageMetadata()
        storage[m.MetadataIndex(name)] = _StorageInfo(e.file, e.start, e.length)
    meta = m.Metadata(state_dict_metadata=described, planner_data=None, storage_data=storage, version="1.0.0")
    return pickle.dumps(meta, protocol=4)
