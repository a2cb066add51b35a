"""A verification in the terminal: verdict, levels, worst places, MTP steps, culprit, and what to type next.

Readable without colour, in 60 columns and through a pipe; bars fall back to ASCII where the output cannot show blocks.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Sequence

from mtp_convert.render import facts, fit, paint
from mtp_convert.summary import printable
from mtp_convert.verify.result import Culprit, LogitScores, PlaceError, Section, SideFacts, Verification
from mtp_convert.verify.svg import LogScale
from mtp_convert.verify.wording import (
    Verdict,
    counted,
    feeds,
    mark,
    next_command,
    number,
    ratio,
    run_text,
    share,
    step_name,
    verdict,
    worst_first,
)

MOST_PLACES = 8
MOST_FINDINGS = 10  # per level
MOST_TENSORS = 8
NARROWEST = 60
COLUMN = 14  # where values begin, as in `facts`
_STYLES = {"agree": "green", "differ": "red", "partial": "yellow", "nothing": "yellow",
           "ok": "green", "FAIL": "red", "skipped": "yellow"}  # fmt: skip


def show_verification(v: Verification) -> None:
    """Everything a person needs, the verdict first."""
    width = max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)
    _verdict(verdict(v), width)
    facts(_sides(v, width - COLUMN))
    _levels(v.sections, width)
    _worst(v, width)
    _steps(v.scores)
    if v.culprit:
        _culprit(v.culprit, width)
    print(f"\n{paint('next', 'dim')}          {printable(next_command(v))}")


def _verdict(found: Verdict, width: int) -> None:
    print(f"{paint(found.word, _STYLES[found.outcome])}  {paint(found.title, 'bold')}")
    for line in _wrapped(found.sentence, width):
        print(line)
    print()


def _sides(v: Verification, width: int) -> list[tuple[str, str]]:
    return [*_side("A", v.a, width), *_side("B", v.b, width), ("run", _cut(run_text(v), width))]


def _side(name: str, s: SideFacts, width: int) -> list[tuple[str, str]]:
    what = f"{s.family}, {s.layout} in {s.container}" + (f", run by {s.backend}" if s.backend else "")
    return [(name, _cut(printable(s.path), width)), ("", _cut(printable(what), width))]


def _levels(sections: Iterable[Section], width: int) -> None:
    print("\n" + paint(f"{'level':<10}{'result':<10}{'compared':>9}{'findings':>10}", "dim"))
    for s in sections:
        word = mark(s)
        figures = f"{s.compared:>9}{len(s.problems):>10}"
        print(f"{s.level:<10}{paint(f'{word:<10}', _STYLES[word])}{figures}")
        for note in (*([s.skipped] if s.skipped else []), *s.notes):
            _indented(note, width)
        for problem in s.problems[:MOST_FINDINGS]:
            _indented(f"- {problem.line()}", width)
        if len(s.problems) > MOST_FINDINGS:
            _indented(f"- and {len(s.problems) - MOST_FINDINGS} more; --format json lists all", width)


def _indented(text: str, width: int) -> None:
    for line in _wrapped(text, width - 4):
        print(f"    {line}")


def _shown(text: str) -> str:
    """Text of a file that may begin a line: what runners of CI take for a command there is made visible instead."""
    shown = printable(text).replace("##[", "\\x23#[")
    return f"\\x3a{shown[1:]}" if shown.startswith("::") else shown


def _wrapped(text: str, width: int) -> list[str]:
    """Words in lines of at most `width`; a longer word has a line of its own and is cut in the middle."""
    lines = [""]
    for word in map(_shown, printable(text).split()):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + _cut(word, width)
    return lines


def _worst(v: Verification, width: int) -> None:
    """The places with the largest error over threshold; the bar's middle mark is the threshold."""
    places = worst_first(v)[:MOST_PLACES]
    if not places:
        return
    names = min(max(len(_shown(p.place)) for p in places), 22)
    bar = min(37, width - names - 28)
    print("\n" + paint(f"{'place':<{names}}  {'':<5}{'error':>8}  {'':<{bar}}{'x limit':>10}", "dim"))
    for p in places:
        word, style = ("ok", "green") if p.ok else ("FAIL", "red")
        name = f"{_cut(_shown(p.place), names):<{names}}"
        figures = paint(f"{word:<5}", style) + f"{number(p.relative):>8}"
        print(f"{name}  {figures}  {_bar(p, bar)}{number(ratio(p)):>10}")
    if (left := len(v.places) - len(places)) > 0:
        print(paint(f"and {counted(left, 'place')} further from the threshold", "dim"))


def _cut(text: str, width: int) -> str:
    """`text` in at most `width` columns, in characters that the output can show."""
    return fit(text, width).replace("…", _signs()[2])


def _bar(p: PlaceError, width: int) -> str:
    """Error over threshold from a millionth to a millionfold on a log scale, `|` at one."""
    full, empty, _ = _signs()
    over = ratio(p)
    filled = round(width * (1.0 if math.isinf(over) else LogScale(-6, 6).share(over)))
    cells = [full] * filled + [empty] * (width - filled)
    cells[width // 2] = "|"
    return "".join(cells)


def _signs() -> tuple[str, str, str]:
    """What bars are made of, and what stands for left-out text, if the output can show it."""
    try:
        "█·…".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", ".", "~"
    return "█", "·", "…"


def _steps(scores: Sequence[LogitScores]) -> None:
    if not scores:
        return
    heads = f"{'logits':<10}{'KL, nats':>10}{'top-1':>9}{'top-5':>9}{'accepted A':>12}{'B':>9}"
    print("\n" + paint(heads, "dim"))
    for s in scores:
        accepted = [share(x) for x in s.acceptance] if s.acceptance else ["-", "-"]
        name = _cut(_shown(step_name(s.place)), 9)
        print(f"{name:<10}{number(s.kl):>10}{share(s.top1):>9}{share(s.top5):>9}{accepted[0]:>12}{accepted[1]:>9}")


def _culprit(c: Culprit, width: int) -> None:
    print("\n" + paint(f"first bad place: {_cut(printable(c.place), width - 17)}", "red"))
    if c.guess:
        _indented(c.guess, width)
    for title, names in feeds(c):
        more = [f"and {len(names) - MOST_TENSORS} more"] if len(names) > MOST_TENSORS else []
        for i, name in enumerate([*names[:MOST_TENSORS], *more]):
            label = paint(f"  {'' if i else title:<{COLUMN}}", "dim")
            print(label + _cut(_shown(name), width - COLUMN - 2))
