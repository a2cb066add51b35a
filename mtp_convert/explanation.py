"""What one tensor is: the params in it, the op, and its name and shape in every layout of its family.

Against a checkpoint the answer is exact. Against a family alone the numbers of a name (layer, expert) are left open,
because only a config fixes them: `model.layers.61.eh_proj.weight` is looked up as `model.layers.#.eh_proj.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mtp_convert import adapters
from mtp_convert.checkpoint import Checkpoint, section_of
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.family import Dims, Family
from mtp_convert.mapping.layout import Layout
from mtp_convert.mapping.plan import Step, same_param
from mtp_convert.readable import Readable

NEAR = 5


@dataclass(frozen=True)
class Name:
    """A tensor in one layout; `op` says how it comes from the explained one."""

    layout: str
    tensor: str
    shape: tuple[int, ...]
    op: str


@dataclass(frozen=True)
class Explanation(Readable):
    """One tensor of a family."""

    family: str
    layout: str
    tensor: str
    shape: tuple[int, ...]
    params: list[str]
    copy_of: str  # the param that a copy repeats; empty for a tensor of its own
    names: list[Name]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object (schema_version 1)."""
        names = [{**n.__dict__, "shape": list(n.shape)} for n in self.names]
        return {"schema_version": 1, **self.__dict__, "shape": list(self.shape), "names": names}


def explain_in(checkpoint: Checkpoint, key: str) -> Explanation:
    """Explain a tensor or param name by a checkpoint's own sizes; the name may belong to any layout.

    Raises:
        ConvertError: MTP029 with near misses.
    """
    layouts = {checkpoint.layout.name: checkpoint.layout}
    for title, layout in _layouts(checkpoint.family, checkpoint.dims):
        layouts.setdefault(title, layout)
    found = _lookup(checkpoint.family, layouts, key)
    if found is None:
        raise _unknown(key, [n for layout in layouts.values() for n in layout.bindings])
    return found


def explain_name(key: str, family: str | None, examples: Path) -> Explanation:
    """Explain a name by a family's example config (all families where none is given), numbers left open.

    Args:
        examples: folder with one example config per family, `<family>.json`.

    Raises:
        ConvertError: MTP029 with near misses, MTP021 for an unknown family.
    """
    known = {f.name: f for f in adapters.families()}
    if family is not None and family not in known:
        raise ConvertError("MTP021", Problem("--family", got=family, expected=", ".join(known)))
    near: list[str] = []
    for one in [known[family]] if family else known.values():
        config = json.loads((examples / f"{one.name}.json").read_text(encoding="utf-8"))
        model = section_of(config, adapters.find(config)[1])
        layouts = dict(_layouts(one, one.dims(model, max(one.depths.declared(model), 1))))
        for layout in layouts.values():
            names = (*layout.bindings, *layout.copies, *layout.params)  # decoder layers come before MTP depths
            by_form = {general(n): n for n in reversed(names)}
            near += by_form
            if general(key) in by_form and (found := _lookup(one, layouts, by_form[general(key)])):
                return _opened(found)
    raise _unknown(general(key), near)


def general(name: str) -> str:
    """A name with its numbers left open."""
    return ".".join("#" if word.isdecimal() else word for word in name.split("."))


def _layouts(family: Family, dims: Dims) -> Iterator[tuple[str, Layout]]:
    """Every layout of a family in its released spelling, and every named variant."""
    for name in family.choices:
        yield name, family.layout(name, dims)
        for variant, words in family.variants.get(name, {}).items():
            yield f"{name} ({variant})", family.layout(name, dims, words)


def _lookup(family: Family, layouts: Mapping[str, Layout], key: str) -> Explanation | None:
    for title, layout in layouts.items():
        copied = layout.copies.get(key, "")
        if key not in layout.bindings and not copied:
            continue
        binding = layout.copy_binding(key) if copied else layout.bindings[key]
        params = [part.param for part in binding.parts]
        names = _names(layouts, title, params)
        return Explanation(family.name, title, key, binding.shape, params, copied, names)
    first = next(iter(layouts.values()))
    if key in first.params:
        names = _names(layouts, "", [key])
        return Explanation(family.name, "param", key, first.params[key].shape, [key], "", names)
    return None


def _names(layouts: Mapping[str, Layout], own: str, params: Sequence[str]) -> list[Name]:
    """Every tensor of every other layout that holds one of the params."""
    source = layouts.get(own) or next(iter(layouts.values()))
    names = []
    for title, layout in layouts.items():
        if title == own:
            continue
        homes = {binding.tensor: binding for binding, _ in (layout.home[p] for p in params)}
        steps = (Step(binding, binding.shape, source, same_param) for binding in homes.values())
        names += [Name(title, step.tensor, step.shape, step.op) for step in steps]
    return names


def _opened(found: Explanation) -> Explanation:
    """The same with the example's numbers left open, each name once."""
    names = {(n.layout, general(n.tensor)): Name(n.layout, general(n.tensor), n.shape, n.op) for n in found.names}
    params = list(dict.fromkeys(map(general, found.params)))
    return Explanation(
        found.family, found.layout, general(found.tensor), found.shape, params, found.copy_of, list(names.values())
    )


def _unknown(key: str, names: list[str]) -> ConvertError:
    near = get_close_matches(key, dict.fromkeys(names), NEAR, 0.6)
    hint = f"near misses: {', '.join(near)}" if near else "`mtp-convert families` lists the families that are known"
    return ConvertError("MTP029", Problem("no tensor of this name", got=key), hint=hint)
