"""Words and numbers that every form of a verification shares: terminal, HTML, pictures, JUnit and GitHub."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Literal

from mtp_convert.summary import collapse
from mtp_convert.verify.result import LEVELS, Culprit, PlaceError, Section, Verification

Outcome = Literal["agree", "differ", "partial", "nothing"]
Mark = Literal["ok", "FAIL", "skipped"]
WORDS: dict[Outcome, str] = {"agree": "PASS", "differ": "FAIL", "partial": "PARTIAL", "nothing": "NOTHING COMPARED"}


@dataclass(frozen=True)
class Verdict:
    """The result in one word, in a headline and in a sentence."""

    outcome: Outcome
    title: str
    sentence: str

    @property
    def word(self) -> str:
        """`PASS`, `FAIL`, ..."""
        return WORDS[self.outcome]


def verdict(v: Verification) -> Verdict:
    """What a reader needs to know first. Only forward passes make a pass: equal names alone prove nothing."""
    if not v.ok or first_bad(v):
        return Verdict("differ", "The sides differ", _difference(v))
    compared = [s for s in v.sections if s.compared]
    left = ", ".join(level for level in LEVELS if level not in {s.level for s in compared})
    if not compared:
        return Verdict("nothing", "Nothing was compared", f"Not compared: {left}.")
    if not any(s.level == "forward" for s in compared):
        equal = ", ".join(s.level for s in compared)
        title = "No difference found, but no forward pass either"
        return Verdict("partial", title, f"Equal in {equal}; not compared: {left}.")
    title = "The sampled places compute the same" if v.quick else "Both sides compute the same"
    return Verdict("agree", title, _agreement(v))


def _difference(v: Verification) -> str:
    found = ", ".join(f"{s.level} {len(s.problems)}" for s in v.sections if s.problems)
    place = first_bad(v)
    findings = f" Findings: {found}." if found else ""
    if place is None:
        return findings.lstrip()
    error = next((p for p in v.places if p.place == place), None)
    figures = f" Relative error {number(error.relative)}, threshold {number(error.threshold)}." if error else ""
    return f"The first place beyond what rounding explains is {place}.{figures}{findings}"


def _agreement(v: Verification) -> str:
    count = counted(v.section("forward").compared, "place")
    text = f"{count}{' of a quick run' if v.quick else ''}, each within what rounding explains"
    if not v.places:
        return f"{text}."
    worst = worst_first(v)[0]
    if worst.relative == 0:
        return f"{text}: every error is exactly 0."
    return f"{text}. Closest to its threshold: {worst.place}, at {number(ratio(worst))} of it."


def first_bad(v: Verification) -> str | None:
    """The place where the sides part: the culprit, else the first place beyond its threshold."""
    if v.culprit is not None:
        return v.culprit.place
    return next((p.place for p in v.places if not p.ok), None)


def mark(section: Section) -> Mark:
    """One word per level. A level that ran into problems before it was skipped has failed."""
    if section.problems:
        return "FAIL"
    return "skipped" if section.skipped else "ok"


def ratio(p: PlaceError) -> float:
    """Relative error over threshold; infinite for what is no number."""
    if not math.isfinite(p.relative) or math.isnan(p.threshold):
        return math.inf
    if p.threshold == 0:
        return 0.0 if p.relative == 0 else math.inf
    return p.relative / p.threshold


def worst_first(v: Verification) -> list[PlaceError]:
    """Places by error over threshold, largest first; equal ones in the order they run."""
    return sorted(v.places, key=lambda p: -ratio(p))


def step_name(place: str) -> str:
    """`main` for `logits`, `MTP 0` for every place of `mtp.0`."""
    head, _, rest = place.partition(".")
    return f"MTP {rest.partition('.')[0]}" if head == "mtp" and rest else "main"


def number(value: float) -> str:
    """`1.2e-07`, `0.310`, `42.0`, `0`, `NaN`, `inf`: as many figures as a reader compares."""
    if math.isnan(value):
        return "NaN"
    if value == 0 or math.isinf(value):
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if 1e-2 <= abs(value) < 999.5 else f"{value:.1e}"


def share(value: float) -> str:
    """`99.9%`. Rounded down, so that only a share of one is 100%."""
    if not math.isfinite(value):
        return number(value)
    return "100%" if value == 1 else f"{math.floor(value * 1000) / 10:.1f}%"


def feeds(c: Culprit) -> list[tuple[str, list[str]]]:
    """Lists of names with their titles: what differs, and what feeds the place; equal names but for numbers are one."""
    sides = [("Feeds it", c.a)] if c.a == c.b else [("Feeds it in A", c.a), ("Feeds it in B", c.b)]
    lists = [("Differing", c.suspects), *sides]
    return [(title, [row.name for row in collapse((n, 0, ()) for n in names)]) for title, names in lists if names]


def counted(count: int, noun: str) -> str:
    """`1 place`, `2 places`."""
    return f"{count} {noun}{'s'[: count != 1]}"


def run_text(v: Verification) -> str:
    """How the passes ran: `float32 on cpu, 2 rows of 64 tokens, weights streamed, 12.3 s`."""
    rows, positions = v.tokens
    if not rows:
        return f"no forward pass, {v.seconds:.1f} s"
    parts = [f"{v.dtype} on {v.device}", f"{counted(rows, 'row')} of {counted(positions, 'token')}"]
    parts += [f"weights {'streamed' if v.mode == 'streamed' else 'loaded whole'}"]
    parts += ["quick"] if v.quick else []
    return ", ".join([*parts, f"{v.seconds:.1f} s"])


def command_line(v: Verification) -> str:
    """What runs this verification again: as it was typed, if that is known."""
    return v.environment.get("command") or shlex.join(["mtp-convert", "verify", v.a.path, v.b.path])


def next_command(v: Verification) -> str:
    """What helps most after this result, to paste."""
    if verdict(v).outcome == "agree":
        words = ["verify", v.a.path, v.b.path] if v.quick else ["check", v.b.path]
    elif v.culprit is not None and v.culprit.suspects:
        words = ["explain", v.culprit.suspects[0], v.b.path]
    else:
        words = ["diff", v.a.path, v.b.path]
    return shlex.join(["mtp-convert", *words])
