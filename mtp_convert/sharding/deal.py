"""Deals a model out to ranks: which tensors every file of a legacy checkpoint holds, under which names, which boxes.

Every rank holds what its tensor, pipeline and expert rank say; what is not cut is repeated on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.layout import Binding, Layout, LayoutError, Template
from mtp_convert.mapping.views import Box, Shape
from mtp_convert.sharding.assemble import undivided
from mtp_convert.sharding.cuts import Cut, cut_of
from mtp_convert.sharding.grid import expert_share
from mtp_convert.sharding.pipeline import Chunk
from mtp_convert.sharding.sizes import Rank, Sizes

EMBEDDING, HEAD = "embedding", "head"  # params at the ends of every model; anything else there is with the final norm


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor on a rank: its name there, the tensor it is a part of, its shape, and its boxes in stored order."""

    name: str
    tensor: str
    shape: Shape
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One chunk of the model on a rank; `states`: its modules' `_extra_state`, and whether that is None."""

    key: str
    held: tuple[Held, ...]
    states: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class RankContent:
    """What one rank's file holds."""

    folder: str
    parts: tuple[Part, ...]


def copies(layout: Layout, chunks: Sequence[Chunk]) -> frozenset[str]:
    """The copies that some chunk holds: a tied output layer that is not on the chunk of the embedding."""
    return frozenset(layout.copies) if any(c.head for c in chunks[1:]) else frozenset()


def deal(layout: Layout, shapes: Mapping[str, Shape], chunks: Sequence[Chunk], sizes: Sizes) -> Iterator[RankContent]:
    """The content of every rank's file, in the order of their names.

    Args:
        shapes: shapes as written (vocabulary padded) of the tensors and copies that are written.

    Raises:
        ConvertError: MTP001, with every tensor that the sizes do not divide.
    """
    dealer = _Dealer(layout, shapes, chunks, sizes)
    if problems := [*sizes.problems(), *undivided(layout, sizes), *dealer.problems()]:
        raise ConvertError("MTP001", problems, hint="choose sizes that divide everything they cut")
    for rank in sizes.ranks():
        parts = (dealer.part(rank, c) for c in range(rank.pipeline, sizes.chunks, sizes.pipeline))
        yield RankContent(sizes.folder(rank), tuple(parts))


class _Dealer:
    """Everything of a layout by chunk, with the cut of every tensor."""

    def __init__(self, layout: Layout, shapes: Mapping[str, Shape], chunks: Sequence[Chunk], sizes: Sizes) -> None:
        self.sizes = sizes
        self.chunks = chunks
        self.shapes = shapes
        self.cuts: dict[str, Cut] = {}
        self.held: list[list[tuple[int | None, str, Binding]]] = [[] for _ in chunks]
        modules: dict[str, list[int]] = {}
        copied = map(layout.copy_binding, layout.copies)
        for binding in (*layout.bindings.values(), *copied):
            where = self._where(binding.template, self._end(binding, layout))
            modules[binding.tensor.rpartition(".")[0]] = where
            if binding.tensor in layout.copies:
                where = [c for c in where if c]  # the embedding itself is on the first chunk
            if binding.tensor in shapes:
                if not where:
                    raise LayoutError(f"no chunk holds {binding.tensor!r}")
                rows = shapes[binding.tensor][0] if binding.vocab else None
                self.cuts[binding.tensor] = cut_of(binding, layout.params, rows)
                for chunk in where:
                    self.held[chunk].append((*self._local(binding.template, chunk), binding))
        self.states: list[list[tuple[int | None, str, bool]]] = [[] for _ in chunks]
        for state in layout.states:
            module = state.template.name().rpartition(".")[0]
            for chunk in self._where(state.template, modules.get(module, [])):
                self.states[chunk].append((*self._local(state.template, chunk), state.none))

    def _end(self, binding: Binding, layout: Layout) -> list[int]:
        """The chunks of a tensor at the ends of the model."""
        param = binding.parts[0].param
        if param == HEAD or binding.tensor in layout.copies:
            return [i for i, c in enumerate(self.chunks) if c.head]
        if param == EMBEDDING:
            return [i for i, c in enumerate(self.chunks) if c.embedding]
        return [i for i, c in enumerate(self.chunks) if c.final_norm]

    def _where(self, template: Template, end: list[int]) -> list[int]:
        """The chunks that hold a tensor: by decoder layer, with the MTP depths, or at the ends."""
        if "i" in template.at:
            return [i for i, c in enumerate(self.chunks) if template.at["i"] in c.layers]
        if "k" in template.at:
            return [i for i, c in enumerate(self.chunks) if c.mtp]
        return end

    def problems(self) -> Iterator[Problem]:
        """Tensors that cannot be cut into equal shares."""
        seen = set()
        for _, _, binding in (held for chunk in self.held for held in chunk):
            n = self.sizes.expert_tensor if "e" in binding.template.at else self.sizes.tensor
            cut = self.cuts[binding.tensor]
            text = binding.template.text
            if not cut.divides(n) and text not in seen:
                seen.add(text)
                yield Problem(text, got=f"rows or columns {cut.runs}", expected=f"multiples of {n}")

    def part(self, rank: Rank, chunk: int) -> Part:
        """What a rank holds of a chunk."""
        held = []
        for expert, name, b in self.held[chunk]:
            if expert in (None, rank.expert):
                n = self.sizes.tensor if expert is None else self.sizes.expert_tensor
                cut, shape = self.cuts[b.tensor], self.shapes[b.tensor]
                held.append(Held(name, b.tensor, cut.local(shape, n), cut.boxes(shape, rank.tensor % n, n)))
        states = tuple((name, none) for expert, name, none in self.states[chunk] if expert in (None, rank.expert))
        return Part(self.sizes.key(chunk), tuple(held), states)

    def _local(self, template: Template, chunk: int) -> tuple[int | None, str]:
        """The expert rank of a tensor, and its name on a chunk."""
        expert, local = expert_share(template, self.sizes)
        if "i" in template.at:
            local["i"] = template.at["i"] - self.chunks[chunk].layers.start
        return expert, template.name(**local)
