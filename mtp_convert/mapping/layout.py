"""A layout over one config: the complete list of tensors with shapes and the params inside them, checked as a whole.

Building a layout proves an exact cover: every param lies in exactly one tensor, every tensor is tiled by its params
without hole or overlap, and no name is used twice. A table that cannot be right is refused before a file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from mtp_convert.mapping.ops import Op
from mtp_convert.mapping.rules import (
    SAME,
    Block,
    Copy,
    Domains,
    Extra,
    Param,
    Placed,
    Rule,
    Tied,
    Words,
    assignments,
    expand,
    fields_of,
    holds,
)
from mtp_convert.mapping.views import Shape, View


class LayoutError(Exception):
    """A table that is wrong in itself: a mistake of an adapter, never of a user's file."""


@dataclass(frozen=True, slots=True)
class Part:
    """A param and where it lies in the tensor of the binding."""

    param: str
    view: View


@dataclass(frozen=True, slots=True)
class Template:
    """A name with its indices still open, the values that make it the full name, and how many values some can have.

    Sharded checkpoints count layers and experts from zero in every rank, so the same template names both.
    """

    text: str
    at: Mapping[str, int] = field(default_factory=dict, hash=False)
    counts: Mapping[str, int] = field(default_factory=dict, hash=False)

    def name(self, **local: int) -> str:
        """The name with these indices in place of its own."""
        return self.text.format_map({**self.at, **local})


NAMELESS = Template("")


@dataclass(frozen=True, slots=True)
class State:
    """The `_extra_state` of a module, as a `state_dict` names it; `none` where its value is None."""

    template: Template
    none: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """One layout tensor, all indices filled in. The first `stacked` dimensions are stacking indices."""

    tensor: str
    shape: Shape
    parts: tuple[Part, ...]
    stacked: int = 0
    vocab: bool = False
    high_precision: bool = False
    dtype: str = ""  # the element type that the layout always stores it in; empty where it follows the rest
    plus: float = 0.0  # what the tensor's values are more than its params'
    op: Op = SAME
    template: Template = NAMELESS
    unquantised: bool = False


@dataclass(frozen=True)
class Layout:
    """All tensors of one layout, by name, and by param."""

    name: str
    words: Words
    params: Mapping[str, Param]
    bindings: Mapping[str, Binding]
    objects: tuple[str, ...]
    copies: Mapping[str, str]  # tensor -> param
    home: Mapping[str, tuple[Binding, View]] = field(repr=False)  # param -> where it lies
    states: tuple[State, ...] = field(default=(), repr=False)
    tied: Mapping[str, str] = field(default_factory=dict)  # param -> the param that is stored for it

    def copy_binding(self, tensor: str) -> Binding:
        """The binding that a copy would have if it were the param's own tensor."""
        own, _ = self.home[self.copies[tensor]]
        return replace(own, tensor=tensor, template=Template(tensor))


def narrowed(layout: Layout, keep: Callable[[str], bool]) -> Layout:
    """The part of a layout whose params (by name) are kept; a tensor stays when all of its params do."""
    bindings = {n: b for n, b in layout.bindings.items() if all(keep(p.param) for p in b.parts)}
    params = {p.param for b in bindings.values() for p in b.parts}
    return replace(
        layout,
        params={n: p for n, p in layout.params.items() if n in params},
        bindings=bindings,
        objects=(),
        copies={n: p for n, p in layout.copies.items() if p in params},
        home={n: h for n, h in layout.home.items() if n in params},
        states=(),
    )


def build(name: str, placed: Iterable[Placed], words: Words) -> Layout:
    """Expand the rows of layout `name` at every place.

    Raises:
        LayoutError: the table does not cover the params exactly once, or uses a name twice.
    """
    placed = tuple(placed)
    params = params_of(placed)
    bindings: dict[str, Binding] = {}
    objects: list[str] = []
    states: list[State] = []
    copies: dict[str, str] = {}
    tied: dict[str, str] = {}
    if words.get("decoder") == "stacked":
        placed = tuple(_stacked(name, placed))
    for place in placed:
        prefix = place.prefixes[name]
        domains = {
            **place.block.domains,
            **{n: (v,) for n, v in place.at.items()},
            **_layers(place),
        }
        for row in (r for r in place.block.rows[name] if holds(r, words)):
            if isinstance(row, Rule):
                for b in _bind(row, prefix, place, domains, words, params):
                    if b.tensor in bindings:
                        raise LayoutError(f"{name}: tensor {b.tensor!r} is written by two rules")
                    bindings[b.tensor] = b
            elif isinstance(row, Copy):
                copies[(prefix + row.tensor).format_map({**words, **place.at})] = row.param
            elif isinstance(row, Tied):
                tied[(place.param + row.param).format_map(dict(place.at))] = row.to
            else:
                objects += _objects(row, prefix, domains, words)
                states += (State(t, row.none) for t in _templates(prefix + row.key, place, domains, words))
    home = _home(name, bindings, params, tied)
    return Layout(name, dict(words), params, bindings, tuple(objects), copies, home, tuple(states), tied)


def params_of(placed: Iterable[Placed]) -> dict[str, Param]:
    """Every param of every place, by full name."""
    params: dict[str, Param] = {}
    for place in placed:
        base = place.param.format_map(dict(place.at))
        for param in place.block.params:
            for at in expand(param.name, place.block.domains):
                full = base + param.name.format_map(at)
                if full in params:
                    raise LayoutError(f"param {full!r} is declared twice")
                params[full] = replace(param, name=full)
    return params


def _bind(
    row: Rule,
    prefix: str,
    place: Placed,
    domains: Domains,
    words: Words,
    params: Mapping[str, Param],
) -> Iterator[Binding]:
    """One binding per assignment of the indices in the tensor's name."""
    template = prefix + row.tensor
    names = [place.param + p for p in row.params]
    for named in _templates(template, place, domains, words):
        at = named.at
        parts: list[Part] = []
        counts = tuple(len(domains[n]) for n in row.over)
        shape: Shape = ()
        for position, stacked_at in assignments(row.over, domains):
            full = [n.format_map({**at, **stacked_at}) for n in names]
            try:
                shapes = [params[f].shape for f in full]
                shape, views = row.op.place(shapes)
            except (KeyError, ValueError) as error:
                raise LayoutError(f"{template}: {error}") from error
            for index in reversed(position):
                views = tuple(v.under(index) for v in views)
            parts += [Part(f, v) for f, v in zip(full, views, strict=True)]
        first = [params[p.param] for p in parts]
        yield Binding(
            named.name(),
            counts + shape,
            tuple(parts),
            len(counts),
            vocab=any(p.vocab for p in first),
            high_precision=all(p.high_precision for p in first),
            dtype=row.dtype,
            plus=row.plus,
            op=row.op,
            template=named,
            unquantised=any(p.unquantised for p in first),
        )


def _templates(template: str, place: Placed, domains: Domains, words: Words) -> Iterator[Template]:
    """The template with its words filled in, once per assignment of its indices."""
    text = template.format_map({**{n: f"{{{n}}}" for n in fields_of(template)}, **words})
    counts = {n: len(values) for n, values in place.block.domains.items()}
    for at in expand(template, domains):
        yield Template(text, {**place.at, **at}, counts)


def _objects(row: Extra, prefix: str, domains: Domains, words: Words) -> Iterator[str]:
    """Object keys end in `/shard_<indices>_<counts>`, both joined by dots; a plain object is `shard_0_1`."""
    template = prefix + row.key
    counts = [len(domains[n]) for n in row.over] or [1]
    for at in expand(template, domains):
        key = template.format_map({**words, **at})
        for position, _ in assignments(row.over, domains):
            index = ".".join(map(str, position or (0,)))
            yield f"{key}/shard_{index}_{'.'.join(map(str, counts))}"


def _layers(place: Placed) -> Domains:
    """A stacked place brings the values of its stacking index along (see `_stacked`)."""
    return {place.stack: range(place.at["count"])} if "count" in place.at else {}


def _stacked(layout: str, placed: tuple[Placed, ...]) -> Iterator[Placed]:
    """Merge the places that share a stacking index into one whose rules stack over it."""
    groups: dict[tuple[str, str], list[Placed]] = {}
    for place in placed:
        if place.stack:
            groups.setdefault((place.stack, place.param), []).append(place)
        else:
            yield place
    for (index, _), members in groups.items():
        first = members[0]
        if any(m.block != first.block for m in members):
            raise LayoutError(f"{layout}: layers of different kinds cannot be stacked")
        rows: list[Rule | Extra] = []
        for row in first.block.rows[layout]:
            if isinstance(row, Rule | Extra):
                rows.append(replace(row, over=(index, *row.over)))
        prefix = first.prefixes[layout].replace(f"{{{index}}}.", "")
        block = Block(first.block.params, {layout: tuple(rows)}, first.block.domains)
        yield Placed(block, first.param, {layout: prefix}, {"count": len(members)}, index)


def _home(
    name: str, bindings: Mapping[str, Binding], params: Mapping[str, Param], tied: Mapping[str, str]
) -> dict[str, tuple[Binding, View]]:
    """Where each param lies; the exact-cover check. Tied params lie where the other one does (if that is placed)."""
    home: dict[str, tuple[Binding, View]] = {}
    for b in bindings.values():
        for part in b.parts:
            if part.param in home:
                other = home[part.param][0].tensor
                raise LayoutError(f"{name}: param {part.param!r} is in {other!r} and in {b.tensor!r}")
            home[part.param] = (b, part.view)
        filled = sum(prod(params[p.param].shape) for p in b.parts)
        if filled != prod(b.shape) or not _disjoint(b):
            raise LayoutError(f"{name}: the params of {b.tensor!r} do not tile its shape {b.shape}")
    missing = sorted(params.keys() - home.keys() - tied.keys())
    if missing:
        raise LayoutError(f"{name}: no tensor holds {', '.join(missing[:5])} ({len(missing)} in all)")
    for param, to in tied.items():
        if param in home or (to in params and params[to].shape != params[param].shape):
            raise LayoutError(f"{name}: {param!r} cannot be tied to {to!r}")
    return home | {param: home[to] for param, to in tied.items() if to in home}


def _disjoint(binding: Binding) -> bool:
    """Whether no two parts start at the same element (with equal volumes this rules out an overlap of ops)."""
    return len({p.view.start for p in binding.parts}) == len(binding.parts)
