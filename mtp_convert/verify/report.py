"""A verification as one HTML file that needs nothing else: no script is necessary, and no address is ever asked.

The content security policy allows only the style and the script of this package, by their digests, and no request
at all; so text of a checkpoint could not run even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtp_convert import __version__
from mtp_convert.errors import Problem
from mtp_convert.verify.markup import Markup, join, raw, tag
from mtp_convert.verify.pictures import depth_bars_svg, error_plot_svg, gauge
from mtp_convert.verify.result import Culprit, LogitScores, PlaceError, Section, SideFacts, Verification
from mtp_convert.verify.svg import STYLE
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

MOST_FINDINGS = 200  # per level; the JSON output has all
MOST_WORST = 10
MOST_TENSORS = 12
WIDE, NARROW = 920, 380  # pixels of the two forms of a picture; the style sheet shows one of them


def write_html(v: Verification, path: Path | str) -> None:
    """Write the report; the same verification gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(v), encoding="utf-8", newline="\n")


def html(v: Verification) -> str:
    """The report as text. It is well-formed XML too."""
    style = _part("report.css") + STYLE
    script = _part("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=f"{policy}; base-uri 'none'; form-action 'none'"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{verdict(v).word}: {v.a.path} and {v.b.path}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", raw(style)),
    )
    sections = (_hero(v), _sides(v), _levels(v), _findings(v), _forward(v), _steps(v), _mapping(v), _again(v))
    body = tag("body", tag("main", *sections), tag("script", raw(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- verdict first


def _hero(v: Verification) -> Markup:
    found = verdict(v)
    return tag(
        "header",
        tag("p", "mtp-convert verify", class_="brand"),
        tag("p", _badge(found.word, found.outcome), class_="result"),
        tag("h1", found.title),
        tag("p", found.sentence, class_="lead"),
        _culprit(v, v.culprit) if v.culprit else join(),
        class_=f"hero {found.outcome}",
    )


def _badge(words: str, kind: str) -> Markup:
    """A result as a word with a sign of its own shape; colour only repeats it."""
    sign = {"agree": "✓", "ok": "✓", "differ": "✕", "FAIL": "✕"}.get(kind, "○")
    return tag("span", tag("span", sign, aria_hidden="true", class_="sign"), words, class_=f"badge {kind}")


def _culprit(v: Verification, c: Culprit) -> Markup:
    """Where the sides part, and what feeds that place."""
    return tag(
        "section",
        tag("h2", "Where they part: ", tag("code", c.place)),
        tag("p", c.guess) if c.guess else join(),
        tag("dl", *(join(tag("dt", title), tag("dd", _names(names))) for title, names in feeds(c))),
        tag("p", "Look closer with ", tag("code", next_command(v), class_="command")),
        class_="culprit",
        aria_label="Culprit",
    )


def _names(names: Sequence[str]) -> Markup:
    more = [tag("li", f"and {len(names) - MOST_TENSORS} more")] if len(names) > MOST_TENSORS else []
    return tag("ul", *(tag("li", tag("code", n)) for n in names[:MOST_TENSORS]), *more)


# --- what was compared


def _sides(v: Verification) -> Markup:
    cards = (_side("A", v.a), _side("B", v.b))
    return _block("Sides", tag("div", *cards, class_="sides"), tag("p", "Run: ", run_text(v), class_="note"))


def _side(name: str, side: SideFacts) -> Markup:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in side.dtypes.items())
    facts = [("Family", side.family), ("Layout", side.layout), ("Container", side.container), ("Tensors", dtypes)]
    facts.append(("Run by", side.backend))
    title = tag("h3", tag("span", name, class_="side"), tag("code", side.path))
    return tag("article", title, _facts(facts), aria_label=f"Side {name}")


def _facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs if value))


def _levels(v: Verification) -> Markup:
    rows = [
        tag(
            "tr",
            tag("th", s.level, scope="row"),
            tag("td", _badge(mark(s), mark(s))),
            _figure(str(s.compared)),
            _figure(str(len(s.problems))),
            tag("td", "; ".join([*([s.skipped] if s.skipped else []), *s.notes]), class_="words"),
        )
        for s in v.sections
    ]
    return _block("Levels", _table("What was compared, level by level", LEVEL_HEADS, rows))


def _findings(v: Verification) -> Markup:
    found = [s for s in v.sections if s.problems]
    return _block("Findings", *map(_problems, found)) if found else join()


def _problems(section: Section) -> Markup:
    shown = section.problems[:MOST_FINDINGS]
    left = len(section.problems) - len(shown)
    return tag(
        "details",
        tag("summary", f"{section.level}: {counted(len(section.problems), 'finding')}"),
        _table(f"Findings of level {section.level}", FINDING_HEADS, map(_problem, shown), class_="findings"),
        tag("p", f"and {left} more; the JSON output lists all", class_="note") if left else join(),
        open=len(shown) <= MOST_WORST,
    )


def _problem(p: Problem) -> Markup:
    first = tag("th", p.what, scope="row", class_="words")
    return tag("tr", first, *(tag("td", tag("code", cell) if cell else "") for cell in (p.where, p.got, p.expected)))


# --- forward passes


def _forward(v: Verification) -> Markup:
    if not v.places:
        return join()
    worst = [_place(p, i, v.quick) for i, p in _with_order(v, worst_first(v)[:MOST_WORST])]
    every = [_place(p, i, v.quick) for i, p in _with_order(v, v.places)]
    fed = "Both sides ran on the same random input" if v.quick else "Every place of B was fed what A had there"
    heads = PLACE_HEADS[: len(PLACE_HEADS) - v.quick]
    caption = (
        f"{fed}, so each error is of that place alone. "
        "The grey ground is what rounding makes of A itself; a place above the dashed line is wrong."
    )
    return _block(
        "Error of every place",
        _figure_block(caption, *(error_plot_svg(v, width=w, alone=False) for w in (WIDE, NARROW))),
        tag("h3", "Closest to the threshold, or beyond it"),
        _table("Places with the largest error over threshold", heads, worst, class_="sortable"),
        tag(
            "details",
            tag("summary", f"All {counted(len(every), 'place')}, in the order they run"),
            _table("All places", heads, every, class_="sortable"),
        )
        if len(every) > MOST_WORST
        else join(),
    )


def _with_order(v: Verification, places: Iterable[PlaceError]) -> list[tuple[int, PlaceError]]:
    order = {id(p): i for i, p in enumerate(v.places)}
    return [(order[id(p)], p) for p in places]


def _place(p: PlaceError, order: int, alone: bool) -> Markup:
    """`alone`: the place ran by itself, so there is no chained error."""
    plain = (p.threshold, p.floor, p.max_abs, p.mean_abs)
    return tag(
        "tr",
        tag("th", tag("code", p.place), scope="row", data_key=order),
        tag("td", _badge("ok" if p.ok else "beyond", "ok" if p.ok else "FAIL"), data_key=int(p.ok)),
        _figure(number(p.relative), p.relative),
        _figure(join(gauge(p.relative, p.threshold), tag("span", number(ratio(p)), class_="beside")), ratio(p)),
        *(_figure(number(x), x) for x in plain),
        _figure(number(1 - p.cosine), 1 - p.cosine),
        join() if alone else _figure(number(p.chained), p.chained),
    )


def _steps(v: Verification) -> Markup:
    if not v.scores:
        return join()
    pictures = [depth_bars_svg(v, width=w, alone=False) for w in (WIDE, NARROW)]
    caption = "Each side on its own inputs from the token ids on: rounding accumulates here, and is no verdict."
    table = _table("Logits of both sides", STEP_HEADS, map(_step, v.scores))
    return _block("Logits and drafts", _figure_block(caption, *pictures), table)


def _step(s: LogitScores) -> Markup:
    accepted = " / ".join(map(share, s.acceptance)) if s.acceptance else "—"
    loss = " / ".join(f"{x:.4f}" if math.isfinite(x) else number(x) for x in s.loss)
    cells = (number(s.kl), share(s.top1), share(s.top5), loss, accepted)
    return tag("tr", tag("th", f"{step_name(s.place)} ", tag("code", s.place), scope="row"), *map(_figure, cells))


# --- how to read it, and how to run it again


def _mapping(v: Verification) -> Markup:
    if not v.mapping:
        return join()
    rows = [
        tag("tr", tag("td", tag("code", m.a)), tag("td", m.op), tag("td", tag("code", m.b)), _figure(str(m.count)))
        for m in v.mapping
    ]
    table = _table("Which tensors of A hold what B holds", MAPPING_HEADS, rows, class_="mapping")
    total = sum(m.count for m in v.mapping)
    return _block(
        "Mapping",
        tag("details", tag("summary", f"{counted(len(rows), 'kind')} of tensors, {total} in all"), table),
    )


def _again(v: Verification) -> Markup:
    known = {"mtp-convert": __version__} | v.environment
    known.pop("command", None)
    return _block(
        "Run it again",
        tag("pre", tag("code", command_line(v), class_="command")),
        _facts(known.items()),
    )


# --- tables and frames

Head = tuple[str, bool]  # words, and whether figures stand below
LEVEL_HEADS: list[Head] = [
    ("Level", False),
    ("Result", False),
    ("Compared", True),
    ("Findings", True),
    ("Notes", False),
]
FINDING_HEADS: list[Head] = [("Finding", False), ("Where", False), ("Got", False), ("Expected", False)]
PLACE_HEADS: list[Head] = [
    ("Place", False),
    ("Result", False),
    *(
        (words, True)
        for words in ("Error", "Over threshold", "Threshold", "Floor", "Max abs", "Mean abs", "1 - cosine", "Chained")
    ),
]
STEP_HEADS: list[Head] = [
    ("Logits", False),
    *((words, True) for words in ("KL, nats", "Top-1", "Top-5", "Loss A / B, nats", "Accepted A / B")),
]
MAPPING_HEADS: list[Head] = [("A", False), ("Op", False), ("B", False), ("Tensors", True)]


def _table(caption: str, heads: Sequence[Head], rows: Iterable[Markup], *, class_: str | None = None) -> Markup:
    """A table with a caption for readers who do not see it; wide ones scroll by themselves."""
    cells = (tag("th", words, scope="col", class_="figure" if figures else None) for words, figures in heads)
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *cells)),
        tag("tbody", *rows),
        class_=class_,
    )
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _figure(words: str, key: float | None = None) -> Markup:
    """A cell with a figure; `key` sorts it, what is no number above all."""
    if key is not None and not math.isfinite(key):
        key = 1e308
    return tag("td", words, class_="figure", data_key=None if key is None else repr(float(key)))


def _figure_block(caption: str, wide: str, narrow: str) -> Markup:
    return tag(
        "figure",
        tag("div", raw(wide), class_="wide"),
        tag("div", raw(narrow), class_="narrow"),
        tag("figcaption", caption),
    )


def _block(title: str, *children: str) -> Markup:
    return tag("section", tag("h2", title), *children)
