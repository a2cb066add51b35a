"""Rows of the tables: params, rules, extra objects, and the blocks that bundle them.

Templates hold words of a layout's spelling (`{trunk}`) and indices (`{i}` layer, `{e}` expert, `{k}` MTP depth).
Expanding a template needs every index's values, which come from the config; nothing is ever matched against a stored
name. A word may also decide whether a row holds at all (`only`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from string import Formatter

from mtp_convert.mapping.ops import Op, Same
from mtp_convert.mapping.views import Shape

Domains = Mapping[str, Sequence[int]]
Words = Mapping[str, str]
SAME = Same()


@dataclass(frozen=True, slots=True)
class Param:
    """One logical parameter in its finest form, e.g. `layers.{i}.q` of shape [heads * head_dim, hidden].

    high_precision: stays in its stored dtype when everything else is cast (router bias, A_log, ...).
    unquantised: a matrix that no release stores as codes, because it decides, gates or pools (router, eh_proj, ...).
    vocab: dimension 0 counts tokens, so a stored tensor may have padding rows after the true ones.
    cut: the dimension of which every tensor-parallel rank holds an equal share, in rank order: 0 for what a
    column-parallel layer makes (q, k, v, gate, up, the parts of a Mamba projection, per-head vectors), 1 for the input
    of a row-parallel layer (o, down, out). None: every rank holds all of it (norms, routers, down projections of MLA,
    latent projections, biases of row-parallel layers). Params with an expert index `{e}` are cut by the expert-tensor
    size instead and their experts are dealt out to expert-parallel ranks.
    """

    name: str
    shape: Shape
    high_precision: bool = False
    vocab: bool = False
    cut: int | None = None
    unquantised: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One layout tensor <- its params through one op.

    over: indices stacked in front, outermost first. when: words that must be chosen for the row to hold. dtype: the
    element type that the layout always stores it in, by its safetensors name; empty where it follows the rest. plus:
    tensor = params + plus, for norms whose weight one side counts from 0 and the other from 1.
    """

    tensor: str
    params: tuple[str, ...]
    op: Op = SAME
    over: tuple[str, ...] = ()
    when: Words = field(default_factory=dict)
    dtype: str = ""
    plus: float = 0.0


@dataclass(frozen=True, slots=True)
class Extra:
    """A non-tensor object that a layout stores beside a module, one per value of the indices in `over`.

    none: a `state_dict` holds None for it, not the empty tensor of a TransformerEngine module.
    """

    key: str
    over: tuple[str, ...] = ()
    when: Words = field(default_factory=dict)
    none: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that must hold the same numbers as a param, of any place (its full name), when it is stored at all."""

    tensor: str
    param: str
    when: Words = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tied:
    """A param that a layout stores only as another one, of any place (its full name): it must hold the same numbers.

    Both must be whole tensors wherever they are stored apart.
    """

    param: str
    to: str
    when: Words = field(default_factory=dict)


Row = Rule | Extra | Copy | Tied


@dataclass(frozen=True, slots=True)
class Block:
    """The same numbers in every layout: params with shapes, and the rows that name them, relative to a prefix."""

    params: tuple[Param, ...]
    rows: Mapping[str, tuple[Row, ...]]
    domains: Domains = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placed:
    """A block at one place: prefix of its params, prefix per layout, and the indices fixed here."""

    block: Block
    param: str
    prefixes: Mapping[str, str]
    at: Mapping[str, int] = field(default_factory=dict)
    stack: str = ""  # the index over which a homogeneous model may store these places stacked


def rule(
    tensor: str,
    *params: str,
    op: Op | None = None,
    over: tuple[str, ...] = (),
    dtype: str = "",
    plus: float = 0.0,
) -> Rule:
    """Short form of `Rule` for tables."""
    return Rule(tensor, params, op or SAME, over, dtype=dtype, plus=plus)


def only(*rows: Row, **words: str) -> tuple[Row, ...]:
    """The rows, valid only where these words are chosen: two spellings that differ in structure, not in a name.

    A row that is valid only where one of them is another falls away.
    """
    possible = (
        row for row in rows if all(row.when.get(word, spelling) == spelling for word, spelling in words.items())
    )
    return tuple(replace(row, when={**row.when, **words}) for row in possible)


def holds(row: Row, words: Words) -> bool:
    """Whether a row is part of the layout with these words."""
    return all(words.get(word) == spelling for word, spelling in row.when.items())


def fields_of(template: str) -> list[str]:
    """The names in braces of a template, in order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def expand(template: str, domains: Domains) -> Iterator[dict[str, int]]:
    """Every assignment of the indices that occur in `template`."""
    names = [n for n in dict.fromkeys(fields_of(template)) if n in domains]
    for values in product(*(domains[n] for n in names)):
        yield dict(zip(names, values, strict=True))


def assignments(names: Sequence[str], domains: Domains) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
    """Every assignment of `names`, with its position in each domain."""
    for position in product(*(range(len(domains[n])) for n in names)):
        yield position, {n: domains[n][p] for n, p in zip(names, position, strict=True)}
