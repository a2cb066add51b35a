"""Real torch_dist checkpoints, made by torch itself, and the means to damage them."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mtp_convert.containers import torch_dist
from mtp_convert.containers.base import StoredTensor
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.gather import Reader

FILE = "__0_0.distcp"
TENSORS = {"a": torch.arange(12, dtype=torch.float32).reshape(3, 4), "b": torch.arange(5, dtype=torch.bfloat16)}


@contextmanager
def single_process() -> Iterator[None]:
    """torch warns that no process group exists; none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save(folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS) -> Path:
    """What torch.distributed.checkpoint writes for these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    with single_process():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)
    return folder


def load(folder: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch.distributed.checkpoint reads into tensors of the shapes and types of `like`."""
    state = {n: torch.zeros_like(t) for n, t in like.items()}
    with single_process():
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def edit(folder: Path, change: Callable[[Any], object]) -> Path:
    """Change `.metadata` as an object of torch's own classes."""
    path = folder / torch_dist.METADATA
    meta = pickle.loads(path.read_bytes())
    change(meta)
    path.write_bytes(pickle.dumps(meta))
    return folder


def set_fields(instance: object, **fields: object) -> None:
    """Set fields of frozen records too."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def place(meta: Any, name: str) -> Any:  # noqa: ANN401 - torch's own record
    """Where the first chunk of a tensor lies."""
    return next(info for index, info in meta.storage_data.items() if index.fqn == name)


def zipped(*members: tuple[str, bytes], packed: bool = False) -> bytes:
    """A zip of these members, by Python's own writer; names may repeat."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, data in members:
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def archive(data_pkl: bytes, payload: bytes = b"", *, order: bytes = b"little", packed: bool = False) -> bytes:
    """An item as `torch.save` lays it out."""
    return zipped(("data.pkl", data_pkl), ("byteorder", order), ("data/0", payload), ("version", b"3\n"), packed=packed)


def replace_item(folder: Path, name: str, item: bytes) -> Path:
    """Put another item in the place of the first chunk of a tensor."""
    (folder / "other.distcp").write_bytes(item)
    return edit(folder, lambda m: set_fields(place(m, name), relative_path="other.distcp", offset=0, length=len(item)))


def saved(value: object, *, legacy: bool = False) -> bytes:
    """torch.save into bytes."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def loaded(tensor: StoredTensor) -> torch.Tensor:
    """The numbers of a stored tensor, through the engine."""
    out = torch.zeros(tensor.nbytes, dtype=torch.uint8)
    reader = Reader()
    if tensor.nbytes:
        StoredExtent(tensor).fill(reader, out.numpy(), 0, tensor.nbytes)
    reader.close()
    return out.view(tensor.dtype.torch()).reshape(tensor.shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bits."""
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
