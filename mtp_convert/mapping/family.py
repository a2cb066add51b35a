"""What an adapter declares: one frozen `Family`, made of data and of functions from a config to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from mtp_convert.mapping.layout import Binding, Layout, LayoutError, build
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


def always(config: Config) -> bool:
    """Every config."""
    return True


@dataclass(frozen=True)
class DepthField:
    """How a config counts MTP depths: reading it, and a config that agrees with another number of stored depths.

    name: the field that people correct. counts: whether a config counts depths at all; where not, what is stored does.
    """

    declared: Callable[[Config], int]
    corrected: Callable[[Config, int], dict[str, Any]]
    name: str = "num_nextn_predict_layers"
    counts: Callable[[Config], bool] = always
    others: tuple[str, ...] = ()  # further fields that describe MTP depths; they travel with grafted ones


@dataclass(frozen=True, slots=True)
class Released:
    """What is published of a family: stored MTP depths, and how weights are stored (`bf16`, or kinds of `inspect`)."""

    depths: tuple[int, ...] = (1,)
    encodings: tuple[str, ...] = ("bf16",)


def no_words(dims: Any) -> Words:  # noqa: ANN401 - a family's own dims
    """No word depends on the sizes."""
    return {}


Choices = Mapping[str, tuple[str, ...]]  # word -> its spellings, the released one first
Names = frozenset[str] | Callable[[Binding], bool]  # the stored names, or whether the tensor of a binding is stored


@dataclass(frozen=True, slots=True)
class Form:
    """What a container says about the spelling of a layout.

    fixed: words that it cannot have otherwise. released: words that a Megatron-Core release (major, minor) and all
    later ones write in it, oldest first; they are what is written, reading takes any.
    """

    fixed: Words = field(default_factory=dict)
    released: tuple[tuple[tuple[int, int], Words], ...] = ()

    def words(self, version: tuple[int, int]) -> dict[str, str]:
        """What is written for a release."""
        found: dict[str, str] = {}
        for since, words in self.released:
            if since <= version:
                found.update(words)
        return {**found, **self.fixed}


def count_stored(stored: Names, bindings: Mapping[str, Binding]) -> int:
    """How many of the tensors are stored."""
    if isinstance(stored, frozenset):
        return len(stored & bindings.keys())
    return sum(map(stored, bindings.values()))


@dataclass(frozen=True)
class Family:
    """A model architecture.

    dims(config, depths): the sizes that fix every index; `depths` are the stored ones.
    places(dims): every block of the model with its prefix in each layout.
    variants: spellings of a layout that have a name of their own, as the words that differ from the released one.
    depths: how its config counts MTP depths.
    megatron_words(dims): words of the Megatron layout that depend on the sizes (equal layers are stored stacked);
    hf_words(dims): the same of the Hugging Face layout.
    foreign: fields of a config, or names of tensors, that mean another kind of model; with what it is.
    forms: what a container fixes in the spelling of the Megatron layout.
    nested: words of the Hugging Face layout where the config is a section of a larger model's config.
    wrappers: model types of larger models, whose section is this family's whatever model type it names itself.
    released: what published checkpoints store.
    unproven: why no forward pass compares its Megatron layout with the others; empty where tests do.
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
    megatron_since: tuple[int, int]  # first Megatron-Core release (major, minor) with MTP in this model class
    scales: str = "weight_scale_inv"  # the last word of the names of scales, where a release has blocks of FP8
    bridge_provider: str = ""  # Megatron-Bridge's provider class; empty where it has none
    unproven: str = ""
    notes: tuple[str, ...] = ()
    megatron_words: Callable[[Any], Words] = no_words
    hf_words: Callable[[Any], Words] = no_words
    foreign: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    nested: Words = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    released: Released = Released()

    def layout(self, name: str, dims: Dims, words: Words | None = None) -> Layout:
        """The layout `name` over `dims`, in the released spelling unless `words` say otherwise."""
        return build(name, self.places(dims), {**self.default_words(name, dims), **(words or {})})

    def default_words(self, name: str, dims: Dims) -> dict[str, str]:
        """The released spelling of a layout."""
        first = {word: spellings[0] for word, spellings in self.choices[name].items()}
        by_dims = {"megatron": self.megatron_words, "hf": self.hf_words}.get(name, no_words)
        return {**first, **by_dims(dims)}

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

    def fit(self, name: str, dims: Dims, stored: Names, fixed: Words | None = None) -> Layout:
        """The spelling of layout `name` that explains most of the stored names; `fixed` words are not tried otherwise.

        The ends of the model decide first, over all combinations, because some words help only together; the rest is
        chosen word by word. Of spellings that explain as much, one that asks for nothing more is taken.
        """
        fixed = fixed or {}
        ends = [next(self.places(dims))]
        free = [word for word in self._words_of(name, ends[0]) if word not in fixed]
        starts = [{**words, **fixed} for words in self.spellings(name, dims, free)]
        start = max(starts, key=lambda words: count_stored(stored, build(name, ends, words).bindings))
        best = self.layout(name, dims, start)
        score = count_stored(stored, best.bindings)
        for word, spellings in self.choices[name].items():
            if score == len(best.bindings):
                break
            if word in fixed:
                continue
            for spelling in spellings:
                if spelling == best.words[word]:
                    continue
                try:
                    other = self.layout(name, dims, {**best.words, word: spelling})
                except LayoutError:  # a spelling that this model cannot have, e.g. stacked unequal layers
                    continue
                found = count_stored(stored, other.bindings)
                if found > score or (found == score and found == len(other.bindings) < len(best.bindings)):
                    best, score = other, found
        return best

    def depth_tensors(self, layout: Layout, dims: Dims, k: int) -> frozenset[str]:
        """The tensor names of MTP depth `k` in the spelling of `layout` (the dims must have that depth)."""
        return frozenset(self._depth(layout, dims, k))

    def stored_depths(self, layout: Layout, dims: Dims, stored: Names) -> int:
        """How many MTP depths a checkpoint holds: the depths of which any tensor is there, without a gap."""
        k = 0
        while count_stored(stored, self._depth(layout, with_depths(dims, k + 1), k)):
            k += 1
        return k

    def _depth(self, layout: Layout, dims: Dims, k: int) -> Mapping[str, Binding]:
        placed = [p for p in self.places(dims) if p.at.get("k") == k]
        return build(layout.name, placed, layout.words).bindings

    def fixed(self, layout: str, container: str) -> Words:
        """The words of a layout that a container cannot have otherwise."""
        form = self.forms.get("legacy" if container == "module" else container, Form())
        return {w: s for w, s in form.fixed.items() if w in self.choices[layout]} if layout == "megatron" else {}


def with_depths(dims: Dims, depths: int) -> Dims:
    """The same sizes with another number of physical depths."""
    changed: Dims = replace(dims, depths=depths)  # type: ignore[type-var]
    return changed
