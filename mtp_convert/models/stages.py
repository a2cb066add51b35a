"""Cutting a causal language model into pipeline stages: what every model of this package does alike.

A model has children beside `model`, the backbone, which has `layers` (a ModuleDict, so that they keep their numbers)
and other children. A stage is a copy of the model in which some of them are None, or gone from `layers`.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def layer_problems(stages: Sequence[Sequence[str]], layers: Sequence[str]) -> list[str]:
    """Which of these module names are not on just one stage; ValueError if there is no stage."""
    if not stages:
        raise ValueError("no stages are given")
    placed = [name for stage in stages for name in stage]
    return [f"{name} is on {placed.count(name)} stages" for name in layers if placed.count(name) != 1]


def with_modules(stage: Sequence[str], names: Sequence[str]) -> list[str]:
    """The module names of a stage and those of `names` that it does not have yet."""
    return [*stage, *(name for name in names if name not in stage)]


def cut(model: M, kept: set[str], *, ending: set[str]) -> M:
    """A copy of the model with the modules `kept` and no others; `ending` are those that `lm_head` cannot do without.

    Raises ValueError for names that the model does not have, and for a stage with `lm_head` that lacks others.
    """
    known = {name for name, _ in model.named_modules()}
    if unknown := sorted(kept - known):
        raise ValueError(f"modules of a stage that the model does not have: {unknown}")
    if "lm_head" in kept and (lacking := sorted((ending & known) - kept)):
        raise ValueError(f"the last stage lacks {lacking}")
    stage = copy.deepcopy(model)
    backbone: Any = stage.model
    for owner, prefix in ((stage, ""), (backbone, "model.")):
        for name in [n for n, _ in owner.named_children() if n not in ("model", "layers")]:
            if prefix + name not in kept:
                setattr(owner, name, None)
    for index in [i for i in backbone.layers if f"model.layers.{i}" not in kept]:
        del backbone.layers[index]
    return stage
