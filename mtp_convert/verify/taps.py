"""What listens to a forward pass: one tap records, one feeds recorded inputs, one does both in halves of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtp_convert.engine.runner import Progress
from mtp_convert.verify.side import Tap


@dataclass
class Ticking:
    """Passes everything on to another tap, and counts the places that are done."""

    tap: Tap
    tick: Progress

    def enter(self, place: str, value: Tensor) -> Tensor:
        """See Tap."""
        return self.tap.enter(place, value)

    def leave(self, place: str, value: Tensor) -> None:
        """See Tap."""
        self.tap.leave(place, value)
        self.tick(1)


@dataclass
class Recorder:
    """Keeps the input and output of every place, on the CPU.

    Where a place's input is the output of the place before, they share memory.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    _last: tuple[Tensor, Tensor] | None = None  # as it was given, and as it is kept

    def enter(self, place: str, value: Tensor) -> Tensor:
        """Keep an input."""
        self.inputs[place] = self._keep(value)
        return value

    def leave(self, place: str, value: Tensor) -> None:
        """Keep an output."""
        self.outputs[place] = self._keep(value)

    def _keep(self, value: Tensor) -> Tensor:
        given = value.detach()
        if self._last is not None and _same_memory(given, self._last[0]):
            return self._last[1]
        kept = given.to("cpu", copy=True)
        self._last = given, kept
        return kept


def _same_memory(a: Tensor, b: Tensor) -> bool:
    def where(t: Tensor) -> tuple[object, ...]:
        return t.data_ptr(), t.shape, t.stride(), t.dtype

    return where(a) == where(b)


@dataclass
class Forced:
    """Gives every place an input that is known beforehand, and keeps the outputs on the CPU."""

    given: Mapping[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, place: str, value: Tensor) -> Tensor:
        """The known input in place of `value`; ValueError when their shapes differ."""
        return _like(self.given[place], value, place)

    def leave(self, place: str, value: Tensor) -> None:
        """Keep an output."""
        self.outputs[place] = value.detach().to("cpu", copy=True)


@dataclass
class Halves:
    """For a batch of twice the rows: the first half runs freely, the second gets known inputs at every place."""

    given: Mapping[str, Tensor]
    free: dict[str, Tensor] = field(default_factory=dict)
    forced: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, place: str, value: Tensor) -> Tensor:
        """`value` [2B, ...] with its second half replaced; ValueError when the shapes differ."""
        own, other = value.chunk(2)
        return torch.cat([own, _like(self.given[place], other, place)])

    def leave(self, place: str, value: Tensor) -> None:
        """Keep both halves of an output [2B, ...]."""
        self.free[place], self.forced[place] = (half.detach().to("cpu", copy=True) for half in value.chunk(2))


@dataclass
class Synthetic:
    """Gives every place random input of unit variance, the same for every model, and keeps the outputs.

    For a look at a few places of a model whose other places do not run.
    """

    seed: int
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, place: str, value: Tensor) -> Tensor:
        """Normally distributed numbers in the shape of `value`."""
        if place not in self.inputs:
            generator = torch.Generator().manual_seed(self.seed + len(self.inputs))
            self.inputs[place] = torch.randn(value.shape, generator=generator)
        return _like(self.inputs[place], value, place)

    def leave(self, place: str, value: Tensor) -> None:
        """Keep an output."""
        self.outputs[place] = value.detach().to("cpu", copy=True)


def _like(known: Tensor, value: Tensor, place: str) -> Tensor:
    if known.shape != value.shape:
        raise ValueError(f"{place}: an input of shape {list(value.shape)}, the other side has {list(known.shape)}")
    return known.to(device=value.device, dtype=value.dtype)
