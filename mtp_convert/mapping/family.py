"""What an adapter declares: one frozen `Family`, made of data and of functions from a config to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from mtp_convert.mapping.layout import Layout, LayoutError, build
from mtp_convert.mapping.rules import Placed, Rule, Words, fields_of

Config = Mapping[str, Any]


class ConfigError(Exception):
    """The config lacks or contradicts a field; the message names it."""


class Dims(Protocol):
    """What every family's dims have in common; the rest is the family's own."""

    @property
    def depths(self) -> int:
        """Number of physical (stored) MTP depths."""

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""


Choices = Mapping[str, tuple[str, ...]]  # word -> its spellings, the released one first


@dataclass(frozen=True)
class Family:
    """A model architecture.

    dims(config, depths): the sizes that fix every index; `depths` are the stored ones.
    places(dims): every block of the model with its prefix in each layout.
    variants: spellings of a layout that have a name of their own, as the words that differ from the released one.
    with_depths(config, depths): the HF config that agrees with `depths` stored ones.
    megatron_args(config, steps, repeated): the training arguments that Megatron-LM's --use-checkpoint-args reads.
    """

    name: str
    model_types: tuple[str, ...]
    title: str
    dims: Callable[[Config, int], Dims]
    places: Callable[[Any], Iterator[Placed]]
    choices: Mapping[str, Choices]
    variants: Mapping[str, Mapping[str, Words]] = field(default_factory=dict, kw_only=True)
    declared_depths: Callable[[Config], int]
    with_depths: Callable[[Config, int], dict[str, Any]]
    megatron_args: Callable[[Config, int, bool], dict[str, Any]]
    bridge_provider: str  # Megatron-Bridge's provider class; empty where it has none
    megatron_since: tuple[int, int]  # first Megatron-Core release (major, minor) with MTP in this model class
    notes: tuple[str, ...] = ()

    def layout(self, name: str, dims: Dims, words: Words | None = None) -> Layout:
        """The layout `name` over `dims`, in the released spelling unless `words` say otherwise."""
        return build(name, self.places(dims), {**self.default_words(name), **(words or {})})

    def default_words(self, name: str) -> dict[str, str]:
        """The released spelling of a layout."""
        return {word: spellings[0] for word, spellings in self.choices[name].items()}

    def spellings(self, name: str, words: Iterable[str] | None = None) -> Iterator[dict[str, str]]:
        """Every combination of spellings of a layout (of `words`, the others as released), the released one first."""
        words = list(self.choices[name] if words is None else words)
        for combo in product(*(self.choices[name][w] for w in words)):
            yield {**self.default_words(name), **dict(zip(words, combo, strict=True))}

    def _words_of(self, name: str, place: Placed) -> list[str]:
        """The words that the tensor names of a place depend on."""
        rules = [row for row in place.block.rows[name] if isinstance(row, Rule)]
        templates = (place.prefixes[name], *(row.tensor for row in rules))
        used = {f for template in templates for f in fields_of(template)} | {w for row in rules for w in row.when}
        return [word for word in self.choices[name] if word in used]

    def fit(self, name: str, dims: Dims, stored: frozenset[str]) -> Layout:
        """The spelling of layout `name` that explains most of the stored names.

        The ends of the model decide first, over all combinations, because some words help only together; the rest is
        chosen word by word.
        """
        ends = [next(self.places(dims))]
        starts = self.spellings(name, self._words_of(name, ends[0]))
        start = max(starts, key=lambda words: len(stored & build(name, ends, words).bindings.keys()))
        best = self.layout(name, dims, start)
        score = len(stored & best.bindings.keys())
        for word, spellings in self.choices[name].items():
            if score == len(best.bindings):
                break
            for spelling in spellings[1:]:
                try:
                    other = self.layout(name, dims, {**best.words, word: spelling})
                except LayoutError:  # a spelling that this model cannot have, e.g. stacked unequal layers
                    continue
                if (found := len(stored & other.bindings.keys())) > score:
                    best, score = other, found
        return best

    def depth_tensors(self, layout: Layout, dims: Dims, k: int) -> frozenset[str]:
        """The tensor names of MTP depth `k` in the spelling of `layout` (the dims must have that depth)."""
        placed = [p for p in self.places(dims) if p.at.get("k") == k]
        return frozenset(build(layout.name, placed, layout.words).bindings)

    def stored_depths(self, layout: Layout, dims: Dims, stored: frozenset[str]) -> int:
        """How many MTP depths a checkpoint holds: the depths of which any tensor is there, without a gap."""
        k = 0
        while self.depth_tensors(layout, with_depths(dims, k + 1), k) & stored:
            k += 1
        return k


def with_depths(dims: Dims, depths: int) -> Dims:
    """The same sizes with another number of physical depths."""
    changed: Dims = replace(dims, depths=depths)  # type: ignore[type-var]
    return changed
