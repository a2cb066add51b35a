"""Long lists of tensors made readable: equal rows of different layers, experts or depths become one row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors whose names differ in numbers only and that share `key` (shape, type, op, ...)."""

    name: str
    count: int
    nbytes: int
    key: tuple[Hashable, ...]


def collapse(items: Iterable[tuple[str, int, tuple[Hashable, ...]]]) -> list[Row]:
    """Rows for (name, bytes, key), in the order of first appearance."""
    groups: dict[tuple[Hashable, ...], list[tuple[str, int]]] = {}
    for name, nbytes, key in items:
        words = tuple(map(_stem, name.split(".")))
        groups.setdefault((words, *key), []).append((name, nbytes))
    rows = []
    for group, members in groups.items():
        names = [n.split(".") for n, _ in members]
        rows.append(Row(_pattern(names), len(members), sum(b for _, b in members), group[1:]))
    return rows


def _pattern(names: Sequence[Sequence[str]]) -> str:
    columns = zip(*names, strict=True)
    return ".".join(_column(list(dict.fromkeys(c))) for c in columns)


def _stem(word: str) -> str:
    """A number without its digits; experts number their weights (`weight12`), or halves of them (`weight12_w`)."""
    half = word[-2:] if word.endswith(("_w", "_v")) else ""
    whole = word.removesuffix(half)
    stem = whole.rstrip("0123456789")
    return f"{stem}#{half}" if stem != whole and stem in ("", "weight") else word


def _column(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    stem, _, half = _stem(values[0]).partition("#")
    return f"{stem}{{{ranges(sorted(int(v.removeprefix(stem).removesuffix(half)) for v in values))}}}{half}"


def ranges(numbers: Sequence[int]) -> str:
    """`0..3,7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}..{p[1]}" for p in parts)


def size_text(nbytes: float) -> str:
    """`5.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def printable(text: str) -> str:
    """Text from a file, safe for a terminal: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
