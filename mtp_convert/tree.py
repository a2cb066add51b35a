"""Rows of tensors as a tree: what names begin with alike is said once, with its size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mtp_convert.summary import Row


@dataclass
class Node:
    """A part of names that rows have in common; a leaf holds its row."""

    name: str
    row: Row | None = None
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of everything below."""
        return (self.row.nbytes if self.row else 0) + sum(child.nbytes for child in self.children.values())


@dataclass(frozen=True)
class Line:
    """One line of a drawn tree: a branch (row None) or a leaf."""

    depth: int
    name: str
    nbytes: int
    row: Row | None


def flat(rows: Iterable[Row]) -> Iterator[Line]:
    """No tree: whole names, for programs that search them."""
    return (Line(0, row.name, row.nbytes, row) for row in rows)


def lines(rows: Iterable[Row]) -> Iterator[Line]:
    """The tree of rows, drawn from the top, in the order of first appearance."""
    root = Node("")
    for row in rows:
        node = root
        *parents, leaf = words(row.name)
        for word in parents:
            node = node.children.setdefault(word, Node(word))
        # Rows may share a name and differ in shape; each is a leaf of its own.
        node.children[f"{leaf}\n{len(node.children)}"] = Node(leaf, row)
    for child in root.children.values():
        yield from _drawn(child, 0, "")


def _drawn(node: Node, depth: int, before: str) -> Iterator[Line]:
    """A node with one child alone shares its line with it."""
    name = before + node.name
    if node.row is not None:
        yield Line(depth, name, node.nbytes, node.row)
    elif len(node.children) == 1:
        yield from _drawn(next(iter(node.children.values())), depth, name + ".")
    else:
        yield Line(depth, name, node.nbytes, None)
        for child in node.children.values():
            yield from _drawn(child, depth + 1, "")


def words(name: str) -> list[str]:
    """The parts of a name between dots, an index joined to what it counts: `layers.{0..3}.mlp` is two."""
    parts, depth = [""], 0
    for c in name:
        depth += (c == "{") - (c == "}")
        if c == "." and not depth:
            parts.append("")
        else:
            parts[-1] += c
    found: list[str] = []
    for part in parts:
        if found and (part.isdecimal() or part.startswith("{")):
            found[-1] += f".{part}"
        else:
            found.append(part)
    return found
