"""The levels that need no forward pass: which params both sides have, in which shapes, with which values."""

from __future__ import annotations

from collections.abc import Mapping

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.depths import at_depth, depth_of
from mtp_convert.difference import CheckpointDifference, diff
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import Problem
from mtp_convert.mapping.plan import make_plan
from mtp_convert.summary import collapse
from mtp_convert.verify.result import Mapped, Section


def names(a: Checkpoint, b: Checkpoint) -> Section:
    """Both sides have the same params. Depths of a repeated layer count as often as they run."""
    mine, theirs = _shapes(a), _shapes(b)
    sides = (str(a.located.given), mine, theirs), (str(b.located.given), theirs, mine)
    problems = [
        Problem(f"{param} is on this side alone", where)
        for where, own, other in sides
        for param in own
        if param not in other
    ]
    if a.steps != b.steps:
        problems.append(Problem("MTP depths that run", "both configs", str(b.steps), str(a.steps)))
    return Section("names", len(mine.keys() | theirs.keys()), tuple(problems))


def shapes(a: Checkpoint, b: Checkpoint) -> Section:
    """Params of one name have one shape."""
    mine, theirs = _shapes(a), _shapes(b)
    both = [n for n in mine if n in theirs]
    problems = [Problem(n, str(b.located.given), str(theirs[n]), str(mine[n])) for n in both if mine[n] != theirs[n]]
    return Section("shapes", len(both), tuple(problems))


def bits(a: Checkpoint, b: Checkpoint, *, progress: Progress | None = None) -> tuple[Section, CheckpointDifference]:
    """Params hold the same values, bit for bit, where both sides store them in the same form."""
    found = diff(a, b, explain=False, progress=progress)
    problems, other_forms = [], 0
    for row in found.differing:
        if _form(a, row.param) != _form(b, row.param):
            other_forms += 1
        else:
            problems.append(Problem(f"{row.param}: {row.text}", row.a if row.a == row.b else f"{row.a} and {row.b}"))
    notes = [f"{other_forms} params differ and are stored in another type or encoding: the forward pass decides"]
    return Section("bits", found.params, tuple(problems), notes=tuple(notes[: bool(other_forms)])), found


def mapping(a: Checkpoint, b: Checkpoint) -> tuple[Mapped, ...]:
    """Which tensors of B hold which tensors of A, indices collapsed."""
    if a.dims.depths != b.dims.depths:
        return ()
    steps = make_plan(a.layout, b.layout).steps
    rows = collapse((s.tensor, 0, (s.op, ", ".join(dict.fromkeys(map(_stem, s.sources))))) for s in steps)
    return tuple(Mapped(str(r.key[1]), r.name, str(r.key[0]), r.count) for r in rows)


def _stem(name: str) -> str:
    return ".".join("#" if word.isdecimal() else word for word in name.split("."))


def _shapes(c: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """The shapes of all params, every depth that runs included."""
    found = {n: tuple(p.shape) for n, p in c.layout.params.items() if n not in c.layout.tied}
    if c.repeated:
        depth = {n: s for n, s in found.items() if depth_of(n) is not None}
        found |= {at_depth(n, k): s for n, s in depth.items() for k in range(c.steps)}
    return found


def _form(c: Checkpoint, param: str) -> tuple[str, str]:
    """How the tensor that holds a param is stored."""
    if param not in c.layout.home:
        return "", ""
    tensor = c.tensor(c.layout.home[param][0].tensor)
    return tensor.dtype.name, tensor.encoding.scheme.kind if tensor.encoding else ""
