"""torch_dist checkpoints as training writes them: by torch.distributed.checkpoint itself, in any chunks."""

from __future__ import annotations

import io
import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from _kit import MEGATRON, Tensors
from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import TensorProperties as Properties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

Chunk = tuple[tuple[int, ...], tuple[int, ...]]  # offset, sizes
Cut = Callable[[str, Size], list[Chunk]]
RELEASE = "release"


def whole(name: str, shape: Size) -> list[Chunk]:
    """One chunk."""
    return [((0,) * len(shape), tuple(shape))]


def scattered(seed: int) -> Cut:
    """A grid with random cuts along every dimension, in random order: what any mixture of parallel sizes leaves."""
    rng = random.Random(seed)

    def cut(name: str, shape: Size) -> list[Chunk]:
        edges = []
        for n in shape:
            inner = rng.sample(range(1, n), min(rng.randrange(3), n - 1)) if n > 1 else []
            edges.append(list(pairwise([0, *sorted(inner), n])))
        boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in product(*edges)]
        rng.shuffle(boxes)
        return boxes

    return cut


class _Planner(DefaultSavePlanner):
    """One write per chunk; everything that is no tensor becomes an object."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.cut = cut

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, value in self.state_dict.items() for item in self._items(name, value)])
        return self.plan

    def _items(self, name: str, value: object) -> Iterator[WriteItem]:
        if not isinstance(value, Tensor):
            yield WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
            return
        about = Properties.create_from_tensor(value)
        for i, (offset, sizes) in enumerate(self.cut(name, value.shape)):
            data = TensorWriteData(ChunkStorageMetadata(Size(offset), Size(sizes)), about, value.size())
            yield WriteItem(MetadataIndex(name, Size(offset), i), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        value = self.state_dict[write_item.index.fqn]
        if write_item.tensor_data is None:
            file = io.BytesIO()
            torch.save(value, file)
            return file
        chunk = write_item.tensor_data.chunk
        at = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        part: Tensor = value[at]
        return part.clone(memory_format=torch.contiguous_format)


@contextmanager
def single_process() -> Iterator[None]:
    """torch warns that no process group exists; none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def write(root: Path, state: Mapping[str, Any], cut: Cut = whole, *, args: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint root with a tracker file; `args` makes a common.pt beside the shards."""
    folder = root / RELEASE
    folder.mkdir(parents=True)
    with single_process():
        writer = FileSystemWriter(folder, single_file_per_rank=cut is whole, sync_files=False)
        save(dict(state), storage_writer=writer, planner=_Planner(cut), no_dist=True)
    if args is not None:
        torch.save(common(args), folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "latest_checkpointed_iteration.txt").write_text(RELEASE)
    return root


def common(args: Mapping[str, Any]) -> dict[str, Any]:
    """The state that every rank shares."""
    return {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 7, "content_metadata": {}}


def read(folder: Path) -> Tensors:
    """Every tensor of a torch_dist folder, by torch alone."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        n: torch.empty(e.size, dtype=e.properties.dtype)
        for n, e in entries.items()
        if isinstance(e, TensorStorageMetadata)
    }
    with single_process():
        load(state, storage_reader=reader, no_dist=True)
    return state


def golden(name: str) -> Tensors:
    """The tensors that megatron-core wrote."""
    return read(MEGATRON / name / "ckpt" / "iter_0000001")
