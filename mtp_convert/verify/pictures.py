"""Two pictures of a verification as SVG: the error of every place, and how well every MTP step predicts.

Both stand alone (own colours for light and dark, no script, nothing loaded) and are valid XML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtp_convert.verify.markup import Markup, join, tag
from mtp_convert.verify.result import LogitScores, PlaceError, Verification
from mtp_convert.verify.svg import Group, LogScale, line, path, picture, power, side_by_side, text
from mtp_convert.verify.wording import counted, first_bad, number, share, step_name

PLOT_HEIGHT = 250.0
LANE = 24.0  # pixels of the rows for values that a log scale has no place for
APART = 5.0  # pixels between these rows and the scale
LEFT = 52.0
ROW = 30.0
LETTER = 6.0  # pixels, about


def error_plot_svg(v: Verification, *, width: float = 920, alone: bool = True) -> str:
    """Relative error of every place on a log scale, with noise floor and threshold; the first bad place is named.

    NaN and infinite errors stand in a row above the scale, errors of exactly zero in a row below it.
    """
    plot = _Plot.of(v, width)
    legend, top = _legend(width, chained=plot.chained)
    body = [legend, tag("g", *_plot_parts(plot, first_bad(v)), transform=f"translate(0 {top:g})")]
    bad = sum(not p.ok for p in v.places)
    label = f"Relative error of {counted(len(v.places), 'place')} on a log scale; {bad or 'none'} above the threshold"
    return picture(label, width, top + plot.height, body, alone=alone)


@dataclass(frozen=True)
class _Plot:
    """Where things are: y grows downwards from the row of what is no number, over the scale, to the row of zeros."""

    places: tuple[PlaceError, ...]
    groups: list[Group]
    scale: LogScale
    above: float  # height of the row of what is no number; 0 without such places
    below: float
    chained: bool  # whether there is a chain: places that ran alone have none

    @classmethod
    def of(cls, v: Verification, width: float) -> _Plot:
        values = [x for p in v.places for x in (p.relative, p.floor, p.threshold, p.chained)]
        return cls(
            v.places,
            side_by_side([p.place for p in v.places], LEFT, width - 12),
            LogScale.around(values),
            LANE if any(not math.isfinite(p.relative) for p in v.places) else 0,
            LANE if any(p.relative == 0 for p in v.places) else 0,
            not v.quick,
        )

    @property
    def top(self) -> float:
        return 18 + self.above

    @property
    def bottom(self) -> float:
        return self.top + PLOT_HEIGHT

    @property
    def end(self) -> float:
        return self.bottom + self.below

    def grounds(self) -> list[tuple[float, float]]:
        """Upper and lower border of the scale and of the rows beside it."""
        rows = [(self.top - self.above, self.top - APART)] if self.above else []
        rows.append((self.top, self.bottom))
        return rows + ([(self.bottom + APART, self.end)] if self.below else [])

    @property
    def height(self) -> float:
        return self.end + 40

    def y(self, value: float) -> float:
        """On the scale; what is no number is above it."""
        if not math.isfinite(value):
            return self.top - (self.above + APART) / 2
        return self.bottom - self.scale.share(value) * PLOT_HEIGHT

    def dot_y(self, value: float) -> float:
        """As `y`, but exact agreement has a row of its own below the scale."""
        return self.bottom + (self.below + APART) / 2 if value == 0 else self.y(value)


def _plot_parts(plot: _Plot, bad: str | None) -> list[Markup]:
    if not plot.places:
        return [text(LEFT, plot.top + 40, "no forward pass ran")]
    parts = [_axis(plot)]
    start = 0
    for group in plot.groups:
        places = plot.places[start : start + len(group.places)]
        start += len(places)
        parts.append(_group(plot, group, places))
        if bad in group.places:
            parts.append(_pin(plot, group, bad))
    return parts


def _axis(plot: _Plot) -> Markup:
    """The names of the powers of ten, and of the two rows outside the scale."""
    labels = [text(LEFT - 8, plot.y(10.0**e) + 4, power(e), anchor="end") for e in plot.scale.ticks()]
    if plot.above:
        labels.append(text(LEFT - 8, plot.y(math.inf) + 4, "NaN, ∞", anchor="end", class_="alarm"))
    if plot.below:
        labels.append(text(LEFT - 8, plot.dot_y(0) + 4, "0", anchor="end"))
    return tag("g", *labels)


def _group(plot: _Plot, group: Group, places: Sequence[PlaceError]) -> Markup:
    """One ground with its grid, floor, threshold, chain and points."""
    width = group.right - group.left
    parts = [
        *(
            tag("rect", x=group.left, y=y, width=width, height=end - y, rx=3, class_="panel")
            for y, end in plot.grounds()
        ),
        *(line(group.left, plot.y(10.0**e), group.right, plot.y(10.0**e), "rule") for e in plot.scale.ticks()),
        _band(plot, group, places),
        path(_level(plot, group, [p.threshold for p in places]), "limit"),
        *(_chains(plot, group, places) if plot.chained else ()),
        *(_point(plot, group, i, p) for i, p in enumerate(places)),
        *(text(x, plot.end + 15, n, anchor="middle") for x, n in group.numbered()),
        text((group.left + group.right) / 2, plot.end + 32, group.title[:10], anchor="middle", class_="ink"),
    ]
    return tag("g", *parts)


def _level(plot: _Plot, group: Group, values: Sequence[float]) -> list[tuple[float, float]]:
    """A line through a value per place that starts and ends at the group's borders; NaN is passed over."""
    inner = [(group.x(i), max(plot.top, plot.y(x))) for i, x in enumerate(values) if not math.isnan(x)]
    inner = inner or [(group.left, plot.bottom)]
    return [(group.left, inner[0][1]), *inner, (group.right, inner[-1][1])]


def _band(plot: _Plot, group: Group, places: Sequence[PlaceError]) -> Markup:
    upper = _level(plot, group, [p.floor for p in places])
    return path([*upper, (group.right, plot.bottom), (group.left, plot.bottom)], "floor", closed=True)


def _chains(plot: _Plot, group: Group, places: Sequence[PlaceError]) -> list[Markup]:
    """Lines through the chained errors, broken where there is no number."""
    runs: list[list[tuple[float, float]]] = [[]]
    for i, place in enumerate(places):
        if math.isfinite(place.chained):
            runs[-1].append((group.x(i), plot.y(place.chained)))
        elif runs[-1]:
            runs.append([])
    tick = min(3.0, group.step / 2)
    return [path(run if len(run) > 1 else [(run[0][0] - tick, run[0][1]), (run[0][0] + tick, run[0][1])], "chain")
            for run in runs if run]  # fmt: skip


def _point(plot: _Plot, group: Group, index: int, p: PlaceError) -> Markup:
    """A dot, or a cross for what is wrong; the figures appear when the pointer rests on it."""
    x, y, r = group.x(index), plot.dot_y(p.relative), min(3.6, max(1.6, group.step * 0.36))
    words = f"{p.place}: error {number(p.relative)}, threshold {number(p.threshold)}, floor {number(p.floor)}"
    return tag("g", tag("title", words), dot(x, y, r) if p.ok else cross(x, y, r + 1))


def dot(x: float, y: float, r: float) -> Markup:
    """Within the threshold."""
    return tag("circle", cx=x, cy=y, r=r, class_="dot")


def cross(x: float, y: float, r: float) -> Markup:
    """Beyond the threshold."""
    return tag("path", d=f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}",
               class_="cross")  # fmt: skip


def _pin(plot: _Plot, group: Group, place: str) -> Markup:
    """The first bad place: a line from top to bottom and its name."""
    x = group.x(group.places.index(place))
    right = x > (plot.groups[0].left + plot.groups[-1].right) / 2
    name = text(
        x + (-4 if right else 4), 11, f"first: {place}"[:48], anchor="end" if right else "start", class_="alarm"
    )
    return join(line(x, 2, x, plot.end, "pin"), name)


def _legend(width: float, *, chained: bool) -> tuple[Markup, float]:
    """What the marks mean, in as many rows as the width asks for, and the height of that."""
    keys: list[tuple[str, Markup]] = [
        ("within threshold", dot(8, 0, 3.6)),
        ("beyond", cross(8, 0, 4)),
        ("threshold", line(0, 0, 16, 0, "limit")),
        ("rounding alone", tag("rect", x=0.0, y=-5.0, width=16, height=10, class_="floor")),
        ("chained: accumulates, no verdict", line(0, 0, 16, 0, "chain")),
    ][: 4 + chained]
    parts, x, y = [], 2.0, 16.0
    for words, key in keys:
        room = 24 + LETTER * len(words)
        if x > 2 and x + room > width:
            x, y = 2.0, y + 18
        parts.append(tag("g", key, text(22, 4, words), transform=f"translate({x:g} {y:g})"))
        x += room + 14
    return tag("g", *parts), y + 12


def depth_bars_svg(v: Verification, *, width: float = 920, alone: bool = True) -> str:
    """KL divergence (log scale), top-1 agreement and acceptance of the main logits and of every MTP step."""
    panels = _panels(v.scores)
    columns = len(panels) if width >= 700 else 1
    each = (width - 24 * (columns - 1)) / columns
    height = 52 + ROW * len(v.scores)
    body = [
        tag("g", *_panel(panel, v.scores, each),
            transform=f"translate({(each + 24) * (i % columns):.1f} {height * (i // columns):.1f})")
        for i, panel in enumerate(panels)
    ]  # fmt: skip
    label = "KL divergence, top-1 agreement and acceptance per MTP step"
    return picture(label, width, height * math.ceil(len(panels) / columns), body, alone=alone)


@dataclass(frozen=True)
class _Panel:
    """One figure of every step; `values` are shown as bars (a second one hollow), `words` beside them."""

    title: str
    ends: tuple[str, str]
    values: Callable[[LogitScores], tuple[float, ...]]  # shares of the track
    words: Callable[[LogitScores], str]


def _panels(scores: Sequence[LogitScores]) -> list[_Panel]:
    scale = LogScale.around([s.kl for s in scores], low=-8, high=0)
    return [
        _Panel("KL divergence, nats per token", (power(scale.low), power(scale.high)),
               lambda s: (scale.share(s.kl) if math.isfinite(s.kl) else math.nan,), lambda s: number(s.kl)),
        _Panel("Top-1 agreement", ("0", "100%"), lambda s: (s.top1,), lambda s: share(s.top1)),
        _Panel("Drafts accepted: A solid, B hollow", ("0", "100%"),
               lambda s: s.acceptance or (), lambda s: " / ".join(map(share, s.acceptance or ())) or "—"),
    ]  # fmt: skip


def _panel(panel: _Panel, scores: Sequence[LogitScores], width: float) -> list[Markup]:
    left, right = 48.0, width - 96
    parts = [text(0, 16, panel.title, class_="strong")]
    for i, score in enumerate(scores):
        y = 28 + ROW * i
        parts += [text(0, y + 14, step_name(score.place)[:10], class_="ink"),
                  tag("rect", x=left, y=y, width=right - left, height=20, rx=2, class_="panel"),
                  *_bars(panel.values(score), left, right, y),
                  text(width, y + 14, panel.words(score), anchor="end", class_="ink")]  # fmt: skip
    y = 28 + ROW * len(scores) + 8
    return [*parts, text(left, y, panel.ends[0]), text(right, y, panel.ends[1], anchor="end")]


def _bars(shares: Sequence[float], left: float, right: float, y: float) -> list[Markup]:
    """One bar, or two half as high, the second hollow; a cross for what is no number."""
    height = 12.0 if len(shares) == 1 else 7.0
    top = y + (20 - height * len(shares) - (len(shares) - 1)) / 2
    bad = [cross(left + 8, top + i * (height + 1) + height / 2, 3) for i, s in enumerate(shares) if math.isnan(s)]
    return bad + [
        tag("rect", x=left, y=top + i * (height + 1), width=(right - left) * min(1.0, s), height=height, rx=1.5,
            class_="hollow" if i else "bar")
        for i, s in enumerate(shares) if s > 0
    ]  # fmt: skip


def gauge(error: float, threshold: float) -> Markup:
    """A small bar for a table: error over threshold from a thousandth to a thousandfold, a line at one."""
    scale = LogScale(-3, 3)
    over = error / threshold if threshold > 0 else math.inf
    length = 72 * (1.0 if not math.isfinite(over) else scale.share(over))
    bar = tag("rect", x=0.0, y=2, width=length, height=6, rx=1, class_="bar" if over <= 1 else "over")
    track = tag("rect", x=0.0, y=2, width=72, height=6, rx=1, class_="track")
    tick = line(36, 0, 36, 10, "tick")
    return tag("svg", track, bar, tick, viewBox="0 0 72 10", width=72, height=10, aria_hidden="true",
               class_="mv gauge")  # fmt: skip
