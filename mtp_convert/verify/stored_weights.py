"""Values of a checkpoint's tensors, whole or in parts; stored codes are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mtp_convert.containers.base import Stored, StoredChunk, StoredTensor
from mtp_convert.containers.torch_zip import contiguous
from mtp_convert.engine.compare import StoredExtent, in_threads
from mtp_convert.engine.gather import Reader

Task = TypeVar("Task")
THREADS = min(8, os.cpu_count() or 1)  # decoding computes
Index = int | slice | tuple[int | slice, ...]


@dataclass(frozen=True)
class StoredValues:
    """One stored tensor, of which parts can be taken as of a tensor in memory."""

    tensor: StoredTensor
    reader: Reader

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        return torch.Size(self.tensor.shape)

    def __getitem__(self, index: Index) -> Tensor:
        """What numbers and slices without steps choose, in the stored type (of codes: the type of their values).

        Only the parts of the files that it meets are read, or all of it where values are codes.
        """
        index = index if isinstance(index, tuple) else (index,)
        if self.tensor.encoding is not None:
            return self._decoded()[index]
        full = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        spans = [_span(i, n) for i, n in zip(full, self.shape, strict=True)]
        values = torch.empty([len(s) for s in spans], dtype=self.tensor.dtype.torch())
        for chunk in self.tensor.chunks:
            met = [_meet(s, o, n) for s, o, n in zip(spans, chunk.offset, chunk.sizes, strict=True)]
            if all(met):
                place = tuple(slice(m.start - s.start, m.stop - s.start) for m, s in zip(met, spans, strict=True))
                values[place] = self._box(chunk, met)
        return values[tuple(0 if isinstance(i, int) else slice(None) for i in full)]

    def whole(self) -> Tensor:
        """All of it."""
        return self[()]

    def _box(self, chunk: StoredChunk, spans: Sequence[range]) -> Tensor:
        """A box of the tensor that lies within a chunk."""
        size = self.tensor.dtype.itemsize
        strides = tuple(s * size for s in contiguous(chunk.sizes))
        base = chunk.start + sum((m.start - o) * s for m, o, s in zip(spans, chunk.offset, strides, strict=True))
        sizes = tuple(map(len, spans))
        raw = self.reader.dense(chunk.path, base, sizes, strides, size)
        return torch.from_numpy(raw).view(self.tensor.dtype.torch()).reshape(sizes)

    def _decoded(self) -> Tensor:
        extent = StoredExtent(self.tensor)
        raw = np.empty(extent.nbytes, dtype=np.uint8)
        extent.fill(self.reader, raw, 0, extent.nbytes)
        return torch.from_numpy(raw).view(self.tensor.dtype.torch()).reshape(self.shape)


class CheckpointValues(Mapping[str, StoredValues]):
    """The tensors of a checkpoint by name, read when they are asked for; by one thread at a time."""

    def __init__(self, stored: Stored, reader: Reader | None = None) -> None:
        self._stored = stored
        self._reader = reader or Reader()

    def __getitem__(self, name: str) -> StoredValues:
        return StoredValues(self._stored.tensors[name], self._reader)

    def __contains__(self, name: object) -> bool:
        return name in self._stored.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.tensors)

    def __len__(self) -> int:
        return len(self._stored.tensors)

    def each(self, tasks: Iterable[Task], work: Callable[[Task, CheckpointValues], None]) -> None:
        """Do every task in a few threads; each thread has its own view of the checkpoint."""
        in_threads(tasks, lambda task, own: work(task, CheckpointValues(self._stored, own.reader)), threads=THREADS)


def _span(index: int | slice, size: int) -> range:
    if isinstance(index, int):
        return range(index, index + 1)
    return range(*index.indices(size))


def _meet(span: range, offset: int, size: int) -> range:
    return range(max(span.start, offset), min(span.stop, offset + size))
