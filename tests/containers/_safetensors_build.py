"""Builds safetensors files byte by byte, sound and damaged."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))


def packed(header: bytes | Mapping[str, Any], data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A file of this header (bytes or JSON) and data; `length` is a false header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def changed(name: str, **fields: object) -> dict[str, Any]:
    """The sound header with fields of one entry replaced."""
    return {**HEADER, name: {**HEADER[name], **fields}}


def tensor_file(**tensors: bytes) -> bytes:
    """A file of one-dimensional U8 tensors."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    return packed(header, b"".join(tensors.values()))


def sharded(folder: Path, weight_map: object, **files: bytes) -> Path:
    """A folder with an index; file names are given without `.safetensors`."""
    for name, data in files.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
