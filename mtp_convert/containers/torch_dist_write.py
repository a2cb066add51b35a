"""The `.metadata` of torch_dist checkpoints and the objects beside tensors, written without torch.

Tests let torch, torch.distributed.checkpoint and Megatron-Core read the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mtp_convert.containers.base import Shape
from mtp_convert.containers.pickle_write import Call, Global, Made, Pairs, dumps
from mtp_convert.containers.torch_save import save_object, tensor
from mtp_convert.encodings.dtype import BY_NAME, DType

_DCP = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")


class Entry(NamedTuple):
    """A stored item: chunk offset (None for an object), its sizes, and where it lies."""

    offset: Shape | None
    sizes: Shape
    file: str
    start: int
    length: int


def extra_state() -> bytes:
    """What TransformerEngine 2 stores for a module without FP8 state, as Megatron stores objects: in a list."""
    return save_object([tensor(BY_NAME["U8"], (0,))])


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
