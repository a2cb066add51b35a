"""A plan joins two layouts over their params: for every target tensor, which source tensors it is made of and how.

    source tensor --view--> param <--view-- target tensor      =>      one strided copy, or one byte range

A plan is arithmetic on names and shapes; where the bytes lie is the containers' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from mtp_convert.mapping.layout import Binding, Layout, Part
from mtp_convert.mapping.views import Block, Shape, join, whole

Alias = Callable[[str], tuple[str, ...]]


def same_param(param: str) -> tuple[str, ...]:
    """The usual alias: a target param is the source param of the same name."""
    return (param,)


@dataclass(frozen=True)
class Origin:
    """One copy of a step: from one or more source tensors (more than one: their mean) into the target tensor."""

    tensors: tuple[str, ...]
    block: Block


@dataclass(frozen=True)
class Step:
    """One target tensor with everything that flows into it."""

    binding: Binding
    shape: Shape  # as written; rows beyond the binding's are vocabulary padding
    source: Layout
    alias: Alias

    @property
    def tensor(self) -> str:
        """Name of the target tensor."""
        return self.binding.tensor

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order of first use."""
        names = (self._home(p).tensor for part in self.binding.parts for p in self.alias(part.param))
        return tuple(dict.fromkeys(names))

    @property
    def averaged(self) -> int:
        """How many source params make one target param: 1, or the number of depths that are averaged."""
        return len(self.alias(self.binding.parts[0].param))

    @cached_property
    def shift(self) -> float:
        """What the values gain on the way, where the two layouts count them from different numbers.

        Raises:
            ValueError: the sources differ in that; a mistake of an adapter.
        """
        found = {self._home(p).plus for part in self.binding.parts for p in self.alias(part.param)}
        if len(found) > 1:
            raise ValueError(f"{self.tensor}: its sources count from {sorted(found)}")
        return self.binding.plus - found.pop()

    @cached_property
    def _parts(self) -> Mapping[Shape, tuple[Part, ...]]:
        """Parts by their index in the stacked dimensions, so that a chunk of a stack finds its own at once."""
        found: dict[Shape, list[Part]] = {}
        for part in self.binding.parts:
            found.setdefault(part.view.start[: self.binding.stacked], []).append(part)
        return {index: tuple(parts) for index, parts in found.items()}

    def _home(self, param: str) -> Binding:
        return self.source.home[param][0]

    def origins(self, offset: Shape, sizes: Shape) -> Iterator[Origin]:
        """The copies that may touch the target box at `offset` of `sizes`."""
        if (same := self._identical()) is not None:
            yield same
            return
        n = self.binding.stacked
        one = all(s == 1 for s in sizes[:n])
        parts = self._parts.get(offset[:n], ()) if one else self.binding.parts
        for part in parts:
            homes = [self.source.home[p] for p in self.alias(part.param)]
            yield Origin(tuple(b.tensor for b, _ in homes), join(homes[0][1], part.view))

    def _identical(self) -> Origin | None:
        """The whole-tensor copy when both layouts store the same params the same way."""
        first = self.binding.parts[0]
        names = self.alias(first.param)
        homes = [self._home(p) for p in names]
        own = homes[0]
        if own.shape != self.binding.shape or len(own.parts) != len(self.binding.parts):
            return None
        for mine, theirs in zip(self.binding.parts, own.parts, strict=True):
            name = self.alias(mine.param)[0]
            if mine.view != theirs.view or self.source.tied.get(name, name) != theirs.param:
                return None
        view = whole(own.shape)
        return Origin(tuple(h.tensor for h in homes), join(view, view))

    @property
    def op(self) -> str:
        """In a word for people: what happens on the way."""
        return f"{self._move} {self.shift:+g}" if self.shift else self._move

    @property
    def _move(self) -> str:
        if self.averaged > 1:
            return f"mean of {self.averaged}"
        if self._identical() is not None:
            return "copy" if self.sources[0] == self.tensor else "rename"
        n = len(self.sources)
        if self.binding.stacked:
            return f"stack {n}"
        if n > 1:
            return f"fuse {n}"
        return "split" if self._home(self.alias(self.binding.parts[0].param)[0]).stacked == 0 else "unstack"


@dataclass(frozen=True)
class Plan:
    """Every step of a conversion, in the order in which the target stores its tensors."""

    source: Layout
    target: Layout
    steps: tuple[Step, ...]


def make_plan(
    source: Layout,
    target: Layout,
    *,
    alias: Alias = same_param,
    copies: frozenset[str] = frozenset(),
    padded: Mapping[str, int] | None = None,
) -> Plan:
    """Join two layouts.

    Args:
        alias: the source params that make a target param (folded depths have several, unfolded ones share one).
        copies: the target's copy tensors to write besides its own.
        padded: rows to write for a tensor with a vocabulary dimension, by name.
    """
    padded = padded or {}
    bindings = [*target.bindings.values(), *(target.copy_binding(c) for c in sorted(copies))]
    steps = []
    for b in bindings:
        rows = padded.get(b.tensor)
        shape = b.shape if rows is None else (rows, *b.shape[1:])
        steps.append(Step(b, shape, source, alias))
    return Plan(source, target, tuple(steps))


def covered(step: Step) -> bool:
    """Whether the params fill the written shape completely (no padding)."""
    return prod(step.shape) == prod(step.binding.shape)
