"""A verification for GitHub Actions: annotations on the run's page and a summary of the job in Markdown."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtp_convert.summary import printable
from mtp_convert.verify.result import Culprit, LogitScores, Section, Verification
from mtp_convert.verify.wording import (
    command_line,
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

TITLE = "mtp-convert verify"
MOST_ANNOTATIONS = 10  # of one kind and step are what GitHub shows
MOST_WORST = 10
MOST_TENSORS = 12
SIGNS = {"ok": "✅ ok", "FAIL": "❌ FAIL", "skipped": "⏭️ skipped"}
RESULTS = {"agree": "✅", "differ": "❌", "partial": "⚠️", "nothing": "⚠️"}


def publish(v: Verification) -> None:
    """Print the annotations, and append the summary to the file that the runner names in GITHUB_STEP_SUMMARY.

    Raises:
        OSError: that file cannot be written.
    """
    for annotation in annotations(v):
        print(annotation)
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.write(step_summary(v))


def annotations(v: Verification) -> list[str]:
    """Workflow commands, one a line: the verdict if it is bad, then at most ten findings of every level.

    A level with more findings gets one annotation that counts the rest.
    """
    found = verdict(v)
    if found.outcome == "agree":
        return []
    kind = "error" if found.outcome == "differ" else "warning"
    lines = [_command(kind, f"{TITLE}: {found.word}", found.sentence)]
    for section in v.sections:
        lines += _annotated(section)
    return lines


def _annotated(section: Section) -> list[str]:
    shown, more = section.problems[:MOST_ANNOTATIONS], len(section.problems) - MOST_ANNOTATIONS
    lines = [_command("error", f"{TITLE}: {section.level}", p.line()) for p in shown]
    if more > 0:
        lines.append(_command("error", f"{TITLE}: {section.level}", f"and {counted(more, 'finding')} more"))
    return lines


def _command(kind: str, title: str, message: str) -> str:
    """`::error title=...::...`. Control characters are shown as escapes, so a message stays on one line."""
    return f"::{kind} title={escape_property(printable(title))}::{escape_data(printable(message))}"


def escape_data(text: str) -> str:
    """A message, as the runner's command parser wants it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """The value of a property: a message in which colons and commas would end it."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


# --- the summary


def step_summary(v: Verification) -> str:
    """Markdown: verdict, levels, culprit, worst places, a row per MTP step, how to run it again."""
    found = verdict(v)
    parts = [
        f"## {RESULTS[found.outcome]} {TITLE}: {found.title}",
        plain(found.sentence),
        _table(["", "A", "B"], _sides(v)),
        _table(["Level", "Result", "Compared", "Findings", "Notes"], map(_level, v.sections), figures=(2, 3)),
        *(_culprit(v.culprit) if v.culprit else ()),
        *_worst(v),
        *_steps(v.scores),
        f"{plain(run_text(v))}. Run again: {code(command_line(v))}"
        + ("" if found.outcome == "agree" else f"; next: {code(next_command(v))}"),
    ]
    return "\n\n".join(parts) + "\n\n"


def _sides(v: Verification) -> list[list[str]]:
    names = ("path", "family", "layout", "container", "backend")
    return [[name, code(getattr(v.a, name)), code(getattr(v.b, name))] for name in names]


def _level(s: Section) -> list[str]:
    notes = "; ".join([*([s.skipped] if s.skipped else []), *s.notes])
    return [s.level, SIGNS[mark(s)], str(s.compared), str(len(s.problems)), plain(notes)]


def _culprit(c: Culprit) -> list[str]:
    lines = [f"- {title}: {_names(names)}" for title, names in feeds(c)]
    return [f"### First bad place: {code(c.place)}", *([plain(c.guess)] if c.guess else []), "\n".join(lines)]


def _names(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MOST_TENSORS} more"] if len(names) > MOST_TENSORS else []
    return ", ".join([*map(code, names[:MOST_TENSORS]), *more])


def _worst(v: Verification) -> list[str]:
    if not v.places:
        return []
    heads = ["Place", "Result", "Error", "Threshold", "Floor", "Over threshold"]
    rows = [
        [code(p.place), SIGNS["ok" if p.ok else "FAIL"], *map(number, (p.relative, p.threshold, p.floor, ratio(p)))]
        for p in worst_first(v)[:MOST_WORST]
    ]
    return ["### Places closest to the threshold, or beyond it", _table(heads, rows, figures=(2, 3, 4, 5))]


def _steps(scores: Sequence[LogitScores]) -> list[str]:
    if not scores:
        return []
    heads = ["Logits", "KL (nats)", "Top-1", "Top-5", "Accepted A", "Accepted B"]
    rows = [
        [plain(step_name(s.place)), number(s.kl), share(s.top1), share(s.top5),
         *(map(share, s.acceptance) if s.acceptance else ("-", "-"))]
        for s in scores
    ]  # fmt: skip
    return ["### Logits and drafts", _table(heads, rows, figures=(1, 2, 3, 4, 5))]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, figures: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; columns `figures` are flush right."""
    rule = ["---:" if i in figures else "---" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def plain(text: str) -> str:
    """Text that Markdown shows as it is: everything with a meaning is a character reference, which has none."""
    return "".join(c if c.isalnum() or c in " .-/" else f"&#{ord(c)};" for c in printable(text))


def code(text: str) -> str:
    """A name in monospace. A backtick span could be closed by a name, and splits a table at `|`."""
    return f"<code>{plain(text)}</code>" if text else ""
