"""Scales and the frame of a picture: logarithmic values, places side by side, colours for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mtp_convert.verify.markup import Markup, raw, tag

MOST_DECADES = 24
NEAREST_LABELS = 32.0  # pixels between layer numbers
NARROWEST = 44.0  # pixels of a group of places: room for its name
GAP = 6.0
MARGIN = 16.0  # pixels around a picture that stands alone
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Both themes keep text at 4.5:1 and marks at 3:1 against their ground; shapes tell everything again without colour.
STYLE = """
.mv{--ground:#fff;--panel:#f6f7f9;--ink:#1b1f27;--soft:#5d6675;--rule:#e3e6eb;--floor:#d5dae3;--mark:#3b5bdb;\
--bad:#c92a2a;--other:#868e9c;font:11.5px/1.4 Inter,ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,\
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
@media screen and (prefers-color-scheme:dark){.mv{--ground:#14171d;--panel:#1a1e26;--ink:#e8eaee;--soft:#9aa3b2;\
--rule:#2a303b;--floor:#333b49;--mark:#8ba4ff;--bad:#ff8178;--other:#7b8494}}
.mv text{fill:var(--soft)}.mv .ink{fill:var(--ink)}.mv .strong{fill:var(--ink);font-weight:600}\
.mv .alarm{fill:var(--bad);font-weight:600}
.mv .ground{fill:var(--ground)}.mv .panel{fill:var(--panel)}.mv .rule{stroke:var(--rule)}
.mv .floor{fill:var(--floor)}.mv .limit{stroke:var(--ink);stroke-dasharray:4 3;fill:none}
.mv .chain{stroke:var(--other);fill:none}.mv .dot{fill:var(--mark)}
.mv .cross{stroke:var(--bad);stroke-width:2.2;fill:none;stroke-linecap:round}
.mv .pin{stroke:var(--bad);stroke-dasharray:2 2}
.mv .track{fill:var(--rule)}.mv .bar{fill:var(--mark)}.mv .hollow{fill:var(--ground);stroke:var(--mark)}
"""


def picture(label: str, width: float, height: float, body: Sequence[Markup], *, alone: bool) -> Markup:
    """An SVG of `width` x `height` pixels that scales; `alone` gives it a namespace, a style, a ground and a margin."""
    edge = MARGIN if alone else 0
    across, down = width + 2 * edge, height + 2 * edge
    frame = {"viewBox": f"{-edge:g} {-edge:g} {across:g} {down:g}", "role": "img", "aria_label": label, "class_": "mv"}
    if not alone:
        return tag("svg", *body, **frame)
    own = [tag("title", label), tag("style", raw(STYLE))]
    ground = tag("rect", x=-edge, y=-edge, width=across, height=down, rx=8, class_="ground")
    return tag("svg", *own, ground, *body, xmlns="http://www.w3.org/2000/svg", width=across, height=down, **frame)


def text(x: float, y: float, words: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Words at a point; `anchor` is start, middle or end."""
    return tag("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """Straight lines through points."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
    return tag("path", d=d, class_=class_)


@dataclass(frozen=True)
class LogScale:
    """Positive values between two powers of ten, as a share of the way from the lower to the upper one."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float], *, low: int | None = None, high: int | None = None) -> LogScale:
        """Powers of ten that hold every positive, finite value, and 10^low and 10^high if given."""
        exponents = [math.log10(x) for x in values if 0 < x < math.inf]
        bounds = [b for b in (low, high) if b is not None]
        top = max([math.ceil(e) for e in exponents] + bounds, default=0)
        bottom = min([math.floor(e) for e in exponents] + bounds, default=-2)
        return cls(max(min(bottom, top - 2), top - MOST_DECADES), top)

    def share(self, value: float) -> float:
        """0 at 10^low, 1 at 10^high; beyond both ends it stops there."""
        if not value > 0:
            return 0.0
        return min(1.0, max(0.0, (math.log10(value) - self.low) / (self.high - self.low)))

    def ticks(self, most: int = 7) -> list[int]:
        """Exponents at even distances, the upper one first."""
        step = math.ceil((self.high - self.low) / most)
        return list(range(self.high, self.low - 1, -step))


def power(exponent: int) -> str:
    """`10⁻⁶`; `1` for its zeroth."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPT)}"


@dataclass(frozen=True)
class Group:
    """Neighbouring places that belong together: their x positions and the ground they stand on."""

    title: str
    places: tuple[str, ...]
    left: float
    right: float

    @property
    def step(self) -> float:
        """Pixels from one place to the next."""
        return (self.right - self.left) / len(self.places)

    def x(self, index: int) -> float:
        """Where a place stands."""
        return self.left + (index + 0.5) * self.step

    def numbered(self) -> list[tuple[float, str]]:
        """Positions and numbers of the layers that get a label; none for places without numbers."""
        numbers = [p.rpartition(".")[2] for p in self.places]
        if not all(n.isdecimal() for n in numbers):
            return []
        every = next((n for n in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100) if n * self.step >= NEAREST_LABELS), 200)
        return [(self.x(i), n) for i, n in enumerate(numbers) if int(n) % every == 0]


def _title(place: str) -> str:
    head, _, rest = place.partition(".")
    if head == "mtp" and rest:
        return f"MTP {rest.partition('.')[0]}"
    return {"layers": "layers", "embedding": "embed", "final_norm": "head", "logits": "head"}.get(head, head)


def side_by_side(places: Sequence[str], left: float, right: float) -> list[Group]:
    """Groups of places from left to right: as wide as their places are many, but never too narrow for a name."""
    runs = [(title, tuple(run)) for title, run in groupby(places, _title)]
    room = right - left - GAP * (len(runs) - 1)
    narrowest = min(NARROWEST, room / max(1, 2 * len(runs)))
    spare = room - narrowest * len(runs)
    groups, x = [], left
    for title, run in runs:
        width = narrowest + spare * len(run) / len(places)
        groups.append(Group(title, run, x, x + width))
        x += width + GAP
    return groups
