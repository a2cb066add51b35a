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


@dataclass(frozen=True)
class DepthField:
    """How a config counts MTP depths: reading it, and a config that agrees with another number of stored depths."""

    declared: Callable[[Config], int]
    corrected: Callable[[Config, int], dict[str, Any]]


def no_words(dims: Any) -> Words:  # noqa: ANN401 - a family's own dims
    """No word depends on the sizes."""
    return {}


Choices = Mapping[str, tuple[str, ...]]  # word -> its spellings, the released one first


@dataclass(frozen=True)
class Family:
    """A model architecture.

    dims(config, depths): the sizes that fix every index; `depths` are the stored ones.
    places(dims): every block of the model with its prefix in each layout.
    variants: spellings of a layout that have a name of their own, as the words that differ from the released one.
    depths: how its config counts MTP depths.
    megatron_words(dims): words of the Megatron layout that depend on the sizes (equal layers are stored stacked).
    foreign: fields of a config, or names of tensors, that mean another kind of model; with what it is.
    megatron_args(config, steps, repeated): the training arguments that Megatron-LM's --use-checkpoint-args reads.
    """

    name: str
    model_types: tuple[str, ...]
    title: str
    dims: Callable[[Config, int], Dims]
    places: Callable[[Any], Iterator[Placed]]
    choices: Mapping[str, Choices]
    variants: Mapping[str, Mapping[str, Words]] = field(default_factory=dict, kw_only=True)
    depths: DepthField
    megatron_args: Callable[[Config, int, bool], dict[str, Any]]
    bridge_provider: str  # Megatron-Bridge's provider class; empty where it has none
    megatron_since: tuple[int, int]  # first Megatron-Core release (major, minor) with MTP in this model class
    notes: tuple[str, ...] = ()
    megatron_words: Callable[[Any], Words] = no_words
    foreign: Mapping[str, str] = field(default_factory=dict)

    def layout(self, name: str, dims: Dims, words: Words | None = None) -> Layout:
        """The layout `name` over `dims`, in the released spelling unless `words` say otherwise."""
        return build(name, self.places(dims), {**self.default_words(name, dims), **(words or {})})

    def default_words(self, name: str, dims: Dims) -> dict[str, str]:
        """The released spelling of a layout."""
        first = {word: spellings[0] for word, spellings in self.choices[name].items()}
        return {**first, **(self.megatron_words(dims) if name == "megatron" else {})}

    def spellings(self, name: str, dims: Dims, words: Iterable[str] | None = None) -> Iterator[dict[str, str]]:
        """Every combination of spellings of a layout (of `words`, the others as released), the released one first."""
        words = list(self.choices[name] if words is None else words)
        released = self.default_words(name, dims)
        ordered = (sorted(self.choices[name][w], key=lambda s, w=w: s != released[w]) for w in words)  # type: ignore[misc]
        for combo in product(*ordered):
            yield {**released, **dict(zip(words, combo, strict=True))}

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
        starts = self.spellings(name, dims, self._words_of(name, ends[0]))
        start = max(starts, key=lambda words: len(stored & build(name, ends, words).bindings.keys()))
        best = self.layout(name, dims, start)
        score = len(stored & best.bindings.keys())
        for word, spellings in self.choices[name].items():
            if score == len(best.bindings):
                break
            for spelling in spellings:
                if spelling == best.words[word]:
                    continue
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
