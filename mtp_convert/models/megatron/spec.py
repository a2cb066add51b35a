"""Descriptions of modules, to be built later and more than once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleSpec:
    """A module class with arguments of its own: `params` by name, and the description of its children."""

    module: Callable[..., Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    submodules: Any = None


def build_module(spec: ModuleSpec | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (any module)
    """Build what `spec`, a description or a plain class, stands for, with further arguments."""
    if not isinstance(spec, ModuleSpec):
        return spec(*args, **kwargs)
    submodules = {} if spec.submodules is None else {"submodules": spec.submodules}
    return spec.module(*args, **spec.params, **submodules, **kwargs)
