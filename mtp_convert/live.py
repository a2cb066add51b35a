"""Live modules as checkpoints: weights go into a module from any checkpoint, and out of one into any layout.

    load_into(module, "path/to/checkpoint")          fill a module, or this rank's part of a sharded one
    save_from(module, "out", to="hf", hf_config=...)  write what a module holds
    iter_tensors(source, to="hf")                     the same tensor by tensor, nothing on disk

A module is recognised by the names of its state dict, like a folder: our own trees, NeMo AutoModel's, transformers',
and those with Megatron-Core's names. Sharded tensors (DTensor, as FSDP2 leaves them) are gathered one at a time; every
rank of their mesh has to make the same call.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtp_convert import adapters
from mtp_convert.checkpoint import Checkpoint, explained
from mtp_convert.containers.base import Stored, StoredChunk, StoredTensor
from mtp_convert.convert import Result, prepare, run
from mtp_convert.depths import folding
from mtp_convert.encodings.dtype import BY_TORCH_NAME
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Bytes, Reader
from mtp_convert.engine.runner import WINDOW, read_files
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import Located
from mtp_convert.mapping.plan import make_plan
from mtp_convert.mapping.views import Shape
from mtp_convert.options import Options
from mtp_convert.sources import open_source

STATE = "_extra_state"  # what TransformerEngine modules put beside their tensors; no weights
HELD = 256 << 20  # bytes of gathered tensors that are kept for the next reads


@dataclass(frozen=True)
class Loaded:
    """What went into a module."""

    layout: str
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()


def load_into(module: nn.Module, source: Path | str | Checkpoint, *, hf_config: Path | None = None) -> Loaded:
    """Fill the parameters and persistent buffers of `module` from a checkpoint in any layout, container or encoding.

    Values are cast to the module's element types. Of a sharded module every rank reads its own part alone.

    Args:
        source: a checkpoint folder, file or repository on the Hub, or one that is open.
        hf_config: config.json (or its folder) for a source without one.

    Raises:
        ConvertError: the module and the checkpoint are not the same model; nothing has been changed.
    """
    found = source if isinstance(source, Checkpoint) else open_source(source, hf_config=hf_config)
    target = open_module(module, found.config_path)
    if target.family.name != found.family.name:
        raise ConvertError("MTP028", Problem("two families", got=f"{found.family.name} and {target.family.name}"))
    alias, notes = folding(found, target.dims.depths, None)
    padded = {n: t.shape[0] for n, t in target.stored.tensors.items() if t.shape}
    padded = {n: rows for n, rows in padded.items() if (b := target.layout.bindings.get(n)) and b.vocab}
    plan = make_plan(found.layout, target.layout, alias=alias, copies=target.copies, padded=padded)
    state, reader, nbytes = _tensors(module), Reader(), 0
    try:
        for step in plan.steps:
            local, offset = _local(state[step.tensor])
            dtype = BY_TORCH_NAME[_type_name(local)]
            extent = TensorExtent(step, found.stored.tensors, dtype, offset, tuple(local.shape))
            _fill(extent, local, reader)
            nbytes += extent.nbytes
    finally:
        reader.close()
    return Loaded(target.layout.name, len(plan.steps), nbytes, found.notes + notes)


def save_from(
    module: nn.Module,
    target: Path | str,
    *,
    to: str = "hf",
    hf_config: Path | None = None,
    **options: Any,  # noqa: ANN401 - the fields of `Options`
) -> Result | None:
    """Write what `module` holds as a checkpoint in layout `to`, as a conversion would: staged, complete or absent.

    Of a sharded module, rank 0 writes and the others gather with it; they get None.

    Args:
        target: folder to create.
        hf_config: config.json of the model, or a folder whose other files (tokenizer, ...) travel along; by default the
            module's own `config`.
        options: fields of `mtp_convert.options.Options`, e.g. `variant="automodel"`, `dtype="bf16"`, `force=True`.

    Raises:
        ConvertError: the module's names belong to no layout of its family, or as `convert.run`.
    """
    source = open_module(module, hf_config)
    sharded = any(isinstance(t, DTensor) for t in _tensors(module).values())
    # Gathering is collective: every rank has to read in the same order, so one thread reads.
    chosen = replace(Options(to, **options), threads=1) if sharded else Options(to, **options)
    job = prepare(source, chosen)
    if sharded and torch.distributed.get_rank() != 0:
        read_files(job.output.files)
        return None
    return run(job, Path(target))


def iter_tensors(
    source: Path | str | Checkpoint | nn.Module,
    *,
    to: str = "hf",
    hf_config: Path | None = None,
    **options: Any,  # noqa: ANN401 - the fields of `Options`
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of layout `to`, made one at a time on the CPU, from a checkpoint or from a live module.

    For weight sync: what a training module holds goes tensor by tensor into an engine that loads released names. Values
    are high precision; names and values are those that a conversion writes. Memory is one tensor at a time.

    Raises:
        ConvertError: as `open_checkpoint`, or the source cannot be expressed in the target.
    """
    if isinstance(source, nn.Module):
        source = open_module(source, hf_config)
    elif not isinstance(source, Checkpoint):
        source = open_source(source, hf_config=hf_config)
    reader = Reader()
    try:
        for out in prepare(source, Options(to, **options)).tensors:
            tensor = torch.empty(out.shape, dtype=out.dtype.torch())
            _fill(out.whole(source.stored.tensors), tensor, reader)
            yield out.name, tensor
    finally:
        reader.close()


def open_module(module: nn.Module, hf_config: Path | None = None) -> Checkpoint:
    """A module as an opened checkpoint: its state dict, explained by its config.

    Raises:
        ConvertError: exit code 4 when config and tensors disagree.
    """
    folder = _config_folder(module, hf_config)
    name = type(module).__name__
    located = Located(Path(name), Path(name), folder, folder, "native", "module")
    tensors = _tensors(module)
    cache = _Gathered()
    stored = {n: stored_tensor(n, t, cache) for n, t in tensors.items()}
    return explained(Stored("module", Path(name), stored), located, hf_config=folder)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not name.endswith(STATE)
    }


def stored_tensor(name: str, tensor: Tensor, cache: _Gathered | None = None) -> StoredTensor:
    """A tensor in memory as a checkpoint's tensor."""
    cache = cache or _Gathered()
    shape = tuple(tensor.shape)
    chunk = StoredChunk((0,) * len(shape), shape, LiveTensor(name, tensor, cache), 0)
    return StoredTensor(name, BY_TORCH_NAME[_type_name(tensor)], shape, (chunk,))


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config_folder(module: nn.Module, given: Path | None) -> Path:
    """A folder with a config.json that says how many MTP depths the module holds; the rest is as given."""
    if given is not None:
        path = given / "config.json" if given.is_dir() else given
        config = json.loads(path.read_text(encoding="utf-8"))
    elif (own := getattr(module, "config", None)) is not None and hasattr(own, "to_json_string"):
        config = json.loads(own.to_json_string(use_diff=False))
    else:
        raise ConvertError("MTP020", Problem("the module has no config", type(module).__name__), hint="give hf_config")
    corrected = _with_held_depths(config, frozenset(_tensors(module)))
    if given is not None and given.is_dir() and corrected == config:
        return given
    folder = Path(tempfile.mkdtemp(prefix="mtp-convert-module-"))
    weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(corrected), encoding="utf-8")
    return folder


def _with_held_depths(config: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """A module may leave out the MTP depths that its config declares."""
    family, section = adapters.find(config)
    inner: Mapping[str, Any] = config
    for part in section:
        inner = inner[part]
    dims = family.dims(inner, family.depths.declared(inner))
    layouts = (family.fit(n, dims, names, family.fixed(n, "module")) for n in family.choices)
    best = max(layouts, key=lambda layout: len(names & layout.bindings.keys()))
    held = family.stored_depths(best, dims, names)
    if held == family.depths.declared(inner):
        return config
    corrected = family.depths.corrected(inner, held)
    return {**config, section[0]: corrected} if section else corrected


def _local(tensor: Tensor) -> tuple[Tensor, Shape]:
    """This process's part of a tensor, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(offset)


def _fill(extent: TensorExtent, out: Tensor, reader: Reader) -> None:
    """Write an extent into a tensor on any device, window by window."""
    if not out.numel():
        return
    flat = out.reshape(-1)
    size = extent.dtype.itemsize
    per_window = WINDOW // size
    for first in range(0, out.numel(), per_window):
        last = min(first + per_window, out.numel())
        buffer: Bytes = np.empty((last - first) * size, dtype=np.uint8)
        extent.fill(reader, buffer, first * size, last * size)
        values = torch.from_numpy(buffer).view(extent.dtype.torch())
        flat[first:last].copy_(values)
    if flat.data_ptr() != out.data_ptr():  # a copy, where the tensor's memory has gaps
        out.copy_(flat.reshape(out.shape))


class LiveTensor:
    """The bytes of one tensor of a module."""

    def __init__(self, name: str, tensor: Tensor, cache: _Gathered) -> None:
        self.tensor = tensor
        self._name = name
        self._cache = cache

    @property
    def name(self) -> str:
        """What an error message calls the place."""
        return f"the module's {self._name}"

    def read_into(self, at: int, out: Bytes) -> None:
        """Fill `out` from byte `at`; a tensor elsewhere, or in parts, is gathered first."""
        out[:] = self._cache.bytes_of(self.tensor)[at : at + len(out)]


class _Gathered:
    """Tensors as bytes in this process's memory; the last ones are kept, because a tensor is read in windows."""

    def __init__(self) -> None:
        self._held: dict[int, Bytes] = {}
        self._lock = Lock()

    def bytes_of(self, tensor: Tensor) -> Bytes:
        """All bytes of a tensor, row-major."""
        if type(tensor) is not DTensor and tensor.is_cpu and tensor.is_contiguous():
            return _bytes(tensor)
        with self._lock:
            found = self._held.get(id(tensor))
            if found is None:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found = _bytes(whole.detach().contiguous().cpu())
                held = sum(raw.nbytes for raw in self._held.values())
                while self._held and held + found.nbytes > HELD:
                    held -= self._held.pop(next(iter(self._held))).nbytes
                self._held[id(tensor)] = found
            return found


def _bytes(tensor: Tensor) -> Bytes:
    raw: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return raw
