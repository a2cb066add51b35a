"""Every wrong table of one kind: two params of one shape take each other's place on the way to Megatron.

Such a table covers everything exactly once and can be undone, so a round trip cannot see it. One swap stands for one
wrong line: it is made in all decoder layers, or in all MTP depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from mtp_convert.mapping.layout import Layout
from mtp_convert.mapping.views import Shape


@dataclass(frozen=True)
class Swap:
    """A permutation of params; what is not named stays."""

    name: str
    params: Mapping[str, str]

    def alias(self, param: str) -> tuple[str, ...]:
        """The source param that the wrong table takes for `param`."""
        return (self.params.get(param, param),)


def place_of(param: str) -> tuple[str, str]:
    """(`layers.3.`, `mlp.down`): where a param is, and its role there; experts count as places of their own."""
    words = param.split(".")
    if words[0] in ("layers", "mtp"):
        return f"{words[0]}.{words[1]}.", ".".join("e" if w.isdecimal() else w for w in words[2:])
    return "", param


def swaps(layout: Layout) -> Iterator[Swap]:
    """All swaps of two roles in one kind of place, then of whole layers, depths and experts."""
    roles: dict[str, dict[str, dict[str, Shape]]] = {"layers": {}, "mtp": {}, "": {}}
    for name, param in layout.params.items():
        place, role = place_of(name)
        roles[place.partition(".")[0]].setdefault(role, {})[name] = param.shape
    for kind, found in roles.items():
        for (a, first), (b, second) in combinations(found.items(), 2):
            pairs = dict(_pairs(first, second, a, b))
            if pairs:
                yield Swap(f"{kind or 'ends'}: {a} and {b}", {**pairs, **{v: k for k, v in pairs.items()}})
        yield from _neighbours(kind, layout)
    yield from _experts(layout)


def _pairs(first: Mapping[str, Shape], second: Mapping[str, Shape], a: str, b: str) -> Iterator[tuple[str, str]]:
    """Params of two roles at the same place, where their shapes are equal."""
    for name, shape in first.items():
        other = _other(name, a, b)
        if other is not None and second.get(other) == shape:
            yield name, other


def _other(name: str, a: str, b: str) -> str | None:
    """The name with role `b` at the place of one with role `a`; None where only one of them belongs to an expert."""
    place, _ = place_of(name)
    experts = [w for w in name.removeprefix(place).split(".") if w.isdecimal()]
    words = b.split(".")
    if words.count("e") != len(experts):
        return None
    numbers = iter(experts)
    return place + ".".join(next(numbers) if w == "e" else w for w in words)


def _neighbours(kind: str, layout: Layout) -> Iterator[Swap]:
    """Two layers, or two depths, that hold the same roles in the same shapes."""
    if not kind:
        return
    held: dict[str, dict[str, Shape]] = {}
    for name, param in layout.params.items():
        place, _ = place_of(name)
        if place.startswith(kind):
            held.setdefault(place, {})[name.removeprefix(place)] = param.shape
    for (a, first), (b, second) in combinations(held.items(), 2):
        if first == second:
            pairs = {a + role: b + role for role in first}
            yield Swap(f"{a} and {b}", {**pairs, **{v: k for k, v in pairs.items()}})
            return


def _experts(layout: Layout) -> Iterator[Swap]:
    """Experts counted from one instead of zero, whole and in one matrix alone."""
    names = [n for n in layout.params if ".experts." in n]
    parts = sorted({n.rpartition(".")[2] for n in names})
    for chosen in [set(parts), *({p} for p in parts)] if names else []:
        shifted = {}
        for name in names:
            head, _, tail = name.partition(".experts.")
            index, _, part = tail.partition(".")
            following = f"{head}.experts.{int(index) + 1}.{part}"
            if part in chosen:
                shifted[name] = following if following in layout.params else f"{head}.experts.0.{part}"
        yield Swap(f"experts shifted: {', '.join(sorted(chosen))}", shifted)
