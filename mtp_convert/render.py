"""Turns results into text. Data goes to stdout, everything else to stderr; colour only for terminals that want it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from mtp_convert import tree
from mtp_convert.convert import Result
from mtp_convert.difference import CheckpointDifference, Explained, grouped
from mtp_convert.explanation import Explanation
from mtp_convert.fsck import FolderCheck
from mtp_convert.inspection import Inspection, Planned
from mtp_convert.roundtrip import RoundTrip
from mtp_convert.summary import Row, collapse, printable, size_text
from mtp_convert.support import FamilySupport

MOST_ROWS = 60
MOST_NAMES = 12  # of params with one guess
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def paint(text: str, style: str, *, stream: Any = None) -> str:  # noqa: ANN401 - any text stream
    """`text` in a style, if the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if for_people(stream) and not plain else text


def for_people(stream: Any = None) -> bool:  # noqa: ANN401 - any text stream
    """Whether somebody looks at it, and not a program."""
    return bool(os.environ.get("FORCE_COLOR")) or (stream or sys.stdout).isatty()


def _lines(rows: list[Row]) -> Iterator[tree.Line]:
    """A tree for people; in a pipe every name in one piece, to be searched."""
    return tree.lines(rows) if for_people() else tree.flat(rows)


def show_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Aligned `name  value` lines."""
    for name, value in pairs:
        print(f"{paint(f'{name:<13}', 'dim')} {printable(value)}")


def depth_text(stored: int, steps: int, repeated: bool) -> str:
    """`1 stored depth, run 2 times (repeated layer)`."""
    if not stored:
        return "none"
    text = f"{stored} stored depth{'s' if stored > 1 else ''}"
    return f"{text}, run {steps} times (repeated layer)" if repeated else text


def show_inspection(i: Inspection) -> None:
    """Like a good `git status`: what it is, then the tree."""
    print(paint(printable(i.path), "bold"))
    spelling = f" ({', '.join(f'{w}={s!r}' for w, s in i.spelling.items())})" if i.spelling else ""
    facts(
        [
            ("family", f"{i.family}: {i.title}"),
            (
                "layout",
                f"{i.layout}{spelling} in {i.container}, {len(i.files)} file{'s'[: len(i.files) != 1]}",
            ),
            *([("ranks", _parallel(i.parallel))] if i.parallel else []),
            ("size", f"{size_text(i.nbytes)} in {i.tensors} tensors"),
            ("types", ", ".join(f"{n} x {d}" for d, n in i.dtypes.items())),
            *_encodings(i.encodings, i.activation_scales),
            ("MTP", depth_text(i.mtp_stored_depths, i.mtp_steps, i.mtp_repeated_layer)),
            ("embeddings", "tied" if i.tied_embeddings else "not tied"),
        ]
    )
    if i.copies:
        facts([("copies", ", ".join(i.copies))])
    if i.left_behind:
        facts([("not weights", f"{len(i.left_behind)} entries stay behind, e.g. {i.left_behind[0]}")])
    print()
    _tree(i.rows, None)
    if i.mtp_rows:
        print(paint("MTP heads", "cyan"))
        _tree(i.mtp_rows, "cyan")
    _notes(i.notes)


def _encodings(weights: Mapping[str, int], activations: int = 0) -> list[tuple[str, str]]:
    """How many weights are stored in which way; nothing where all are values."""
    parts = [f"{n} x {kind}" for kind, n in weights.items()]
    parts += [f"{activations} scales of activations or caches"] if activations else []
    return [("encodings", ", ".join(parts))] if parts else []


def _parallel(sizes: Mapping[str, int]) -> str:
    """Parallel sizes above 1."""
    names = {"expert_tensor": "expert tensor", "virtual": "virtual pipeline"}
    given = [f"{names.get(size, size)} parallel {n}" for size, n in sizes.items() if n > 1]
    return ", ".join(given) or "one"


def _tree(rows: list[Row], style: str | None) -> None:
    for line in _lines(rows):
        right = ""
        if line.row:
            dtype, shape = line.row.key[0], line.row.key[1]
            right = f"{dtype} {list(shape) if isinstance(shape, tuple) else shape}"
        _line(line, right, style)


def _line(line: tree.Line, right: str, style: str | None) -> None:
    """Name on the left; on the right what is known about it, and its size, in columns."""
    count = f" x{line.row.count}" if line.row and line.row.count > 1 else ""
    right = f"{right}  {size_text(line.nbytes):>9}"
    room = max(20, _width() - len(right) - 3)
    whole = "  " * (line.depth + 1) + printable(line.name) + count
    name = fit(whole, room) if for_people() else whole
    print((paint(f"{name:<{room}}", style) if style else f"{name:<{room}}") + " " + paint(right, "dim"))


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def fit(text: str, width: int) -> str:
    """`text` in at most `width` columns; the middle gives way."""
    if len(text) <= width:
        return text
    keep = width - 1
    return text[: keep // 2] + "…" + text[len(text) - (keep - keep // 2) :]


def show_plan(p: Planned) -> None:
    """Every kind of step once, with its count."""
    print(paint(f"{printable(p.source)}: {p.source_layout} -> {p.target_layout}", "bold"))
    facts(
        [
            ("writes", f"{size_text(p.nbytes)} in {p.files} files, {p.tensors} tensors"),
            *_encodings(p.encodings),
            ("MTP", depth_text(p.mtp_stored_depths, p.mtp_steps, p.mtp_repeated_layer)),
            ("peak memory", f"about {size_text(p.peak_memory)}"),
            ("free disk", size_text(p.free_disk)),
        ]
    )
    print()
    for line in _lines(p.rows):
        op, origin = map(str, line.row.key[:2]) if line.row else ("", "")
        _line(line, op, None)
        if line.row:
            indent = "  " * (line.depth + 3)
            print(indent + paint(fit(f"<- {printable(origin)}", max(20, _width() - len(indent) - 1)), "dim"))
    _notes(p.notes)


def show_result(r: Result, following: Sequence[str] = ()) -> None:
    """The end of a conversion and the commands that may come next."""
    rate = r.nbytes / max(r.seconds, 1e-9)
    print(paint(f"wrote {printable(str(r.target))}", "green"))
    facts(
        [
            ("layout", r.layout),
            (
                "size",
                f"{size_text(r.nbytes)} in {r.tensors} tensors, {len(r.files)} file{'s'[: len(r.files) != 1]}",
            ),
            ("MTP", depth_text(r.physical, r.steps, r.repeated)),
            ("time", f"{r.seconds:.1f} s, {size_text(rate)}/s"),
        ]
    )
    _notes(list(r.notes))
    for command in following:
        print(f"{paint('next', 'dim')}          {printable(command)}")


def show_roundtrip(r: RoundTrip) -> None:
    """Verdict first."""
    verdict = paint("identical", "green") if r.ok else paint("NOT identical", "red")
    print(f"{printable(r.path)} via {r.via} and back: {verdict}")
    facts([("compared", f"{r.tensors} tensors, {size_text(r.nbytes)}, every byte")])
    if r.same_files:
        facts([("files", "the same shard headers, so the same files byte for byte")])
    for title, names in (
        ("missing", r.missing),
        ("unexpected", r.unexpected),
        ("differing", r.differing),
    ):
        for n in names[:MOST_ROWS]:
            print(f"  {paint(title, 'red')} {printable(n)}")
    if not r.same_config:
        print(f"  {paint('config', 'red')} the config.json that came back says something else")


def show_difference(d: CheckpointDifference) -> None:
    """Verdict first, then what happened to which params, the worst first."""
    verdict = paint("equal", "green") if d.equal else paint("different", "red")
    count = f", {len(d.differing)} differences" if d.differing else ""
    print(f"{printable(d.a)} and {printable(d.b)}: {verdict} ({d.params} params compared{count})")
    for side, names in ((d.a, d.only_a), (d.b, d.only_b)):
        for row in collapse((n, 0, ()) for n in names)[:MOST_ROWS]:
            print(f"  only in {printable(side)}: {row.name}" + (f" ({row.count} params)" if row.count > 1 else ""))
    groups = grouped(d.differing)
    for group in groups[:MOST_ROWS]:
        _explained(group)
    if len(groups) > MOST_ROWS:
        print(f"  ... and {len(groups) - MOST_ROWS} more")
    if d.dtypes:
        print(f"  {len(d.dtypes)} params have two types, e.g. {d.dtypes[0]}")


def _explained(group: Explained) -> None:
    """One guess and the param that it fits worst, then the names of the others."""
    worst = group.rows[0]
    names = collapse((row.param, 0, ()) for row in group.rows)
    how = {"exact": " (to the bit)", "rounding": " (to rounding)", "": ""}[worst.fit]
    how += " (from a sample)" if worst.sampled else ""
    what = paint(group.guess or "unexplained", "red") + how
    print(f"{len(group.rows)} params: {what}, e.g." if len(group.rows) > 1 else what)
    print(f"  {paint(worst.param, 'bold')} {list(worst.shape)}" + (f": {worst.detail}" if worst.detail else ""))
    x, y = worst.values
    where = f"{worst.count} of {prod(worst.shape)} differ, first at {list(worst.first)}: {x:.6g} and {y:.6g}"
    print(f"      {where}; max difference {worst.max_abs:.3g} (relative {worst.relative:.3g})")
    figures = f"norms {worst.norms[0]:.6g} and {worst.norms[1]:.6g}, cosine {worst.cosine:.4g}"
    print(paint(f"      {figures}; {worst.a} | {worst.b}", "dim"))
    for row in names[:MOST_NAMES] if len(group.rows) > 1 else ():
        print(f"    {row.name}" + (f" x{row.count}" if row.count > 1 else ""))
    if len(names) > MOST_NAMES:
        print(f"    ... and {len(names) - MOST_NAMES} more kinds")


def show_explanation(e: Explanation) -> None:
    """The tensor, its params, and its names elsewhere."""
    print(f"{paint(printable(e.tensor), 'bold')} {list(e.shape)}: {e.family}, {e.layout}")
    facts([("copy of", e.copy_of)] if e.copy_of else [("params", fit(", ".join(e.params[:MOST_ROWS]), 100))])
    width = max((len(n.layout) for n in e.names), default=0)
    for layout in dict.fromkeys(n.layout for n in e.names):
        rows = [n for n in e.names if n.layout == layout]
        for n in rows[:MOST_ROWS]:
            print(f"  {layout:<{width}} {n.tensor} {list(n.shape)}  " + paint(n.op, "dim"))
        if len(rows) > MOST_ROWS:
            print(f"  {'':<{width}} ... and {len(rows) - MOST_ROWS} more")


def show_families(families: Iterable[FamilySupport]) -> None:
    """One block per family."""
    for f in families:
        print(f"{paint(f.name, 'bold')}: {f.title}")
        layouts = (f"{layout} in {' or '.join(found)}" for layout, found in f.containers.items())
        variants = (f"{name} ({layout})" for layout, names in f.variants.items() for name in names)
        pairs = [
            ("model_type", ", ".join((*f.model_types, *f.wrappers))),
            ("layouts", ", ".join(layouts) + (f"; reads {', '.join(f.read)}" if f.read else "")),
            ("variants", ", ".join(variants)),
            ("MTP", f"{f.depth_field}; released with {' or '.join(map(str, f.released_depths))}"),
            ("encodings", ", ".join(f.released_encodings)),
            ("Megatron", f"{f.megatron_since} or later" + ("; run_config.yaml" if f.bridge_provider else "")),
        ]
        facts((name, text) for name, text in pairs if text)
        for note in f.notes:
            print(f"  - {note}")


def show_check(c: FolderCheck) -> None:
    """Verdict, then the damaged files."""
    verdict = paint("damaged", "red") if c.problems else paint("intact", "green")
    print(f"{printable(c.path)}: {verdict} ({c.files} files, {size_text(c.nbytes)})")
    for problem in c.problems:
        print(f"  {printable(problem)}")


def _notes(notes: list[str]) -> None:
    for note in notes:
        print(f"{paint('note', 'yellow')}          {printable(note)}")


_SHOWN: dict[type, Callable[[Any], None]] = {
    Inspection: show_inspection,
    Planned: show_plan,
    Result: show_result,
    RoundTrip: show_roundtrip,
    CheckpointDifference: show_difference,
    Explanation: show_explanation,
    FolderCheck: show_check,
}


def show(result: object) -> None:
    """A result of any type."""
    _SHOWN[type(result)](result)
