"""Weights that are in memory only while they are used.

A model is built on the meta device, where tensors have shapes and no memory. Its tensors come in groups, those of one
place of the computation: a group is read when it is needed, and where weights are streamed it is freed when the next
one is. A thread reads the next group ahead, unless that is so large that a second one in memory would matter.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

AHEAD = 1 << 30  # bytes; a larger group is read when it is needed

_M_MMAP_THRESHOLD, _MAPPED = -3, 256 << 10  # of malloc.h; blocks of this many bytes are mapped


class Weights(Protocol):
    """What the tensors of a model are made of, by their names in the model."""

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make this one."""

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Their values on the CPU, in shape and dtype of those given."""


class Slot(NamedTuple):
    """Where a module holds a tensor."""

    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """What it holds."""
        held = self.module._buffers.get(self.leaf, self.module._parameters.get(self.leaf))
        assert held is not None
        return held.detach()

    def put(self, value: Tensor) -> None:
        """Make it the module's."""
        if self.leaf in self.module._buffers:
            self.module._buffers[self.leaf] = value
        else:
            self.module._parameters[self.leaf] = nn.Parameter(value, requires_grad=False)


def slots(root: nn.Module) -> dict[str, Slot]:
    """Every tensor that a checkpoint of the model holds, shared ones at each of their places."""
    found = {}
    for prefix, module in root.named_modules():
        own = {**module._parameters, **module._buffers}
        for leaf, tensor in own.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}".lstrip(".")] = Slot(module, leaf)
    return found


def grouped(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Tensor names by group: that of the longest prefix (a module's name) that fits.

    ValueError, naming all of them, for tensors below none of the prefixes: nothing would ever read them.
    """
    groups: dict[str, list[str]] = {group: [] for group in prefixes.values()}
    lost = []
    for name in names:
        owner = name
        while owner and owner not in prefixes:
            owner = owner.rpartition(".")[0]
        if owner in prefixes:
            groups[prefixes[owner]].append(name)
        else:
            lost.append(name)
    if lost:
        raise ValueError(f"tensors of the model that belong to no place: {', '.join(lost)}")
    return {group: tuple(members) for group, members in groups.items()}


class Residency:
    """Keeps the groups of a model in memory, all that were needed or, if `streamed`, the last one alone.

    order: the groups in the order in which they are likely to be needed; a wrong guess costs a read.
    """

    def __init__(
        self,
        root: nn.Module,
        groups: Mapping[str, Collection[str]],
        weights: Weights,
        *,
        device: torch.device,
        streamed: bool,
        order: Sequence[str],
    ) -> None:
        self._slots = slots(root)
        self._meta = {name: slot.tensor for name, slot in self._slots.items()}
        self._groups, self._weights, self._device, self._streamed = groups, weights, device, streamed
        self._order = list(order)
        self._present: set[str] = set()
        self._coming: tuple[str, Future[Mapping[str, Tensor]] | None] = "", None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def __enter__(self) -> Self:
        if self._streamed:
            _give_back_what_is_freed()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._coming = "", None
        for group in tuple(self._present):
            self._free(group)

    def need(self, group: str) -> None:
        """Have these weights in memory now."""
        if group in self._present:
            return
        if self._streamed:
            for other in tuple(self._present):
                self._free(other)
        for name, value in self._take(group).items():
            self._slots[name].put(value.to(self._device))
        self._present.add(group)
        self._prefetch(group)

    def _take(self, group: str) -> Mapping[str, Tensor]:
        (guess, coming), self._coming = self._coming, ("", None)
        if guess == group and coming is not None:
            return coming.result()
        if coming is not None:
            coming.exception()  # one read at a time
        return self._read(group)

    def _read(self, group: str) -> Mapping[str, Tensor]:
        return self._weights.read({name: self._meta[name] for name in self._groups[group]})

    def _prefetch(self, group: str) -> None:
        """Begin to read what follows."""
        if group in self._order:
            del self._order[: self._order.index(group) + 1]
        following = next((g for g in self._order if g not in self._present), None)
        if following is not None and sum(self._meta[name].nbytes for name in self._groups[following]) <= AHEAD:
            self._coming = following, self._thread.submit(self._read, following)

    def _free(self, group: str) -> None:
        for name in self._groups[group]:
            self._slots[name].put(self._meta[name])
        self._present.discard(group)


def _give_back_what_is_freed() -> None:
    """Let glibc map large blocks one by one: it otherwise keeps the memory of freed layers, some hundred MB of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
