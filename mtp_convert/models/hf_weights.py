"""Which stored tensors make which tensors of a transformers model: by the rules by which transformers itself loads.

A release may name tensors differently from the classes of transformers, and keep experts one by one which the classes
hold in one. transformers knows that for every architecture, and its own conversions are run here for a few tensors at
a time. No table of this package is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How stored tensors become tensors of a model.

    made: the first of their names. sources: stored tensors, each with the pattern that it matches. converter: what
    transformers does with them; None for one tensor that stays as it is.
    """

    made: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None
    model: PreTrainedModel | None = field(default=None, repr=False)

    def make(self, read: Read) -> dict[str, Tensor]:
        """The tensors by their names in the model for which the recipe was found."""
        if self.converter is None:
            return {self.made: read(self.sources[0][1])}
        assert self.model is not None
        converter: Any = deepcopy(self.converter)  # its annotations know futures alone, not calls
        for pattern, name in self.sources:
            converter.add_tensor(self.made, name, pattern, partial(read, name))
        found = converter.convert(self.made, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class Made(NamedTuple):
    """One tensor of a model: the recipe, and the name under which that makes it."""

    recipe: Recipe
    name: str

    @classmethod
    def of(cls, stored: str) -> Self:
        """A stored tensor as it is."""
        return cls(Recipe(stored, ((stored, stored),)), stored)

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors."""
        return tuple(name for _, name in self.recipe.sources)


def made_of(model: PreTrainedModel, stored: Mapping[str, str]) -> dict[str, Made]:
    """What makes the tensors of `model`, by their names in it; what nothing makes is left out.

    `stored` are tensors by the names that a release of the model gives them, with the names that they really have.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Made] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state and pattern is None:
            found[target] = Made(Recipe(target, ((name, stored[name]),)), target)
        elif target in state and pattern is not None:
            collected.setdefault(target, []).append((pattern, stored[name]))
    for first, sources in collected.items():
        converter = by_pattern[sources[0][0]]
        recipe = Recipe(first, tuple(sources), converter, model)
        for target in converter.target_patterns:
            name = first.replace(converter.target_patterns[0], target, 1)
            found[name] = Made(recipe, name)
    return found


def empty(build: Callable[[], Any], dtype: torch.dtype) -> Any:  # noqa: ANN401 - any transformers model
    """The model that `build` makes, on the meta device, in evaluation mode.

    Its tensors have the dtypes that transformers gives them in a model of `dtype`. Buffers that no checkpoint holds
    (rotary frequencies) have their values, on the CPU.
    """
    with torch.device("meta"):
        model = build()
    for module in model.modules():
        if missing := [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]:
            for name in missing:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
    if kept := model._get_dtype_plan(dtype):
        _widen(model, kept)
    return model.eval()


def _widen(model: nn.Module, kept: dict[str, torch.dtype]) -> None:
    """What transformers keeps wider than the model."""
    search, group_of, _ = build_glob_alternation(list(kept))
    for name in model.state_dict():
        if (match := search.search(name)) and match.lastgroup:
            owner, _, leaf = name.rpartition(".")
            module, wide = model.get_submodule(owner), kept[group_of[match.lastgroup]]
            if (buffer := module._buffers.get(leaf)) is not None:
                module._buffers[leaf] = buffer.to(wide)
            elif (parameter := module._parameters.get(leaf)) is not None:
                module._parameters[leaf] = nn.Parameter(parameter.to(wide), requires_grad=False)
