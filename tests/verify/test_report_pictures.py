"""The pictures: valid XML on their own, marks where the values are, every kind of value in its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from _results import ALL, broken, failing, hostile, passing, place_names, quick, skipped

from mtp_convert.verify.markup import join, raw, tag
from mtp_convert.verify.pictures import depth_bars_svg, error_plot_svg
from mtp_convert.verify.result import Verification
from mtp_convert.verify.svg import LogScale, power, side_by_side

SVG = "{http://www.w3.org/2000/svg}"
Picture = Callable[[Verification], str]


def marks(v: Verification, name: str, *, width: float = 920) -> list[Element]:
    """Dots or crosses of the plot, without those of the legend."""
    root = ElementTree.fromstring(error_plot_svg(v, width=width))
    points = [g for g in root.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    return [mark for g in points for mark in g if mark.get("class") == name]


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("draw", [error_plot_svg, depth_bars_svg])
@pytest.mark.parametrize("width", [920, 380])
def test_stands_alone(name: str, draw: Callable[..., str], width: float) -> None:
    svg = draw(ALL[name](), width=width)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}style") is not None
    assert "prefers-color-scheme:dark" in svg
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {"svg", "title", "style", "g", "rect", "text", "line",
                                                             "path", "circle"}  # fmt: skip
    assert "nan" not in "".join(e.get("d", "") for e in root.iter())
    left, top, across, down = map(float, root.attrib["viewBox"].split())
    for e in root.iter():
        x, y = float(e.get("cx", 0)), float(e.get("cy", 0))
        assert left <= x <= left + across
        assert top <= y <= top + down


class TestErrors:
    """One mark per place."""

    def test_passing_is_all_dots(self) -> None:
        assert (len(marks(passing(), "dot")), len(marks(passing(), "cross"))) == (57, 0)

    def test_one_bad_place_is_one_cross_and_has_a_name(self) -> None:
        assert (len(marks(failing(), "dot")), len(marks(failing(), "cross"))) == (56, 1)
        assert "first: layers.3" in texts(error_plot_svg(failing()))

    def test_higher_is_worse(self) -> None:
        v = passing(8, 1)
        places = [replace(p, relative=10.0 ** (i - 20)) for i, p in enumerate(v.places)]
        heights = [float(m.attrib["cy"]) for m in marks(replace(v, places=tuple(places)), "dot")]
        assert heights == sorted(heights, reverse=True)
        assert len(set(heights)) == len(heights)

    def test_zero_stands_below_the_smallest_number(self) -> None:
        v = passing(3, 0)
        values = (0.0, 1e-300, 1e-12, 1e-7, 0.0, 1e-9)
        v = replace(v, places=tuple(replace(p, relative=x) for p, x in zip(v.places, values, strict=True)))
        zero, least, *others, again, _ = (float(m.attrib["cy"]) for m in marks(v, "dot"))
        assert zero == again > least > max(others)
        assert "0" in texts(error_plot_svg(v))

    def test_what_is_no_number_stands_above_all_others(self) -> None:
        tops = [float(m.attrib["d"].removeprefix("M").split("l")[0].split()[1]) for m in marks(broken(), "cross")]
        dots = [float(m.attrib["cy"]) for m in marks(broken(), "dot")]
        assert tops[0] == tops[1] < min(dots)
        assert tops[2] > tops[0], "a number with a threshold that is none"
        assert "NaN, ∞" in texts(error_plot_svg(broken()))

    def test_the_chain_breaks_where_it_is_no_number(self) -> None:
        v = passing(9, 1)
        holes = tuple(replace(p, chained=math.nan) if p.place in ("layers.2", "layers.6") else p for p in v.places)
        whole, broken_up = (error_plot_svg(x).count('<path d="M') for x in (v, replace(v, places=holes)))
        assert broken_up == whole + 2

    def test_no_such_rows_where_there_is_no_such_value(self) -> None:
        v = passing(4, 1)
        v = replace(v, places=tuple(replace(p, relative=1e-7) for p in v.places))
        labels = texts(error_plot_svg(v))
        assert "NaN, ∞" not in labels
        assert labels.count("0") == 1, "the first layer, and no row of zeros"

    def test_every_value_bad(self) -> None:
        v = passing(4, 1)
        nan = math.nan
        bad = tuple(replace(p, relative=nan, floor=nan, threshold=nan, chained=nan) for p in v.places)
        assert len(marks(replace(v, places=bad), "cross")) == len(bad)

    def test_places_that_ran_alone_have_no_chain(self) -> None:
        chains = [svg.count('class="chain"') for svg in (error_plot_svg(quick()), error_plot_svg(passing()))]
        assert chains[0] == 0
        assert chains[1] > 0

    def test_nothing_ran(self) -> None:
        assert "no forward pass ran" in texts(error_plot_svg(skipped()))

    def test_hostile_names_are_text(self) -> None:
        assert any("<script>" in t for t in texts(error_plot_svg(hostile())))


class TestSteps:
    """Bars per MTP step."""

    def test_figures_stand_beside_the_bars(self) -> None:
        found = texts(depth_bars_svg(failing()))
        assert {"main", "MTP 0", "MTP 1", "0.0830", "81.2%", "71.0% / 51.5%"} <= set(found)

    def test_lengths_follow_the_shares(self) -> None:
        v = passing()
        v = replace(v, scores=tuple(replace(s, top1=t) for s, t in zip(v.scores, (1.0, 0.5, 0.25), strict=True)))
        panel = list(ElementTree.fromstring(depth_bars_svg(v)).findall(f"{SVG}g"))[1]
        lengths = [float(r.attrib["width"]) for r in panel.findall(f"{SVG}rect") if r.get("class") == "bar"]
        assert [x / lengths[0] for x in lengths] == pytest.approx([1, 0.5, 0.25], abs=1e-3)

    def test_no_bar_for_what_is_no_number(self) -> None:
        root = ElementTree.fromstring(depth_bars_svg(broken()))
        kl, top1, _ = root.findall(f"{SVG}g")
        for panel in (kl, top1):
            assert [e for e in panel if e.get("class") == "bar"] == []
            assert len([e for e in panel if e.get("class") == "cross"]) == 3
        assert {"NaN", "inf"} <= set(texts(depth_bars_svg(broken())))


class TestScale:
    """Logarithms."""

    def test_powers_around_the_values(self) -> None:
        assert LogScale.around([3e-7, 0.2, 0, math.nan, math.inf]) == LogScale(-7, 0)

    def test_at_least_two_decades(self) -> None:
        assert LogScale.around([1e-3]) == LogScale(-5, -3)
        assert LogScale.around([]) == LogScale(-2, 0)

    def test_not_too_many(self) -> None:
        assert LogScale.around([1e-300, 1.0]) == LogScale(-24, 0)

    @pytest.mark.parametrize(("value", "share"), [(1e-4, 0), (1e-2, 0.5), (1, 1), (50, 1), (0, 0), (1e-9, 0)])
    def test_share(self, value: float, share: float) -> None:
        assert LogScale(-4, 0).share(value) == pytest.approx(share)

    def test_names(self) -> None:
        assert [power(e) for e in (-12, 0, 3)] == ["10⁻¹²", "1", "10³"]


@pytest.mark.parametrize(("layers", "depths"), [(1, 0), (48, 2), (240, 3), (8, 20)])
@pytest.mark.parametrize("right", [380.0, 908.0])
def test_groups_lie_side_by_side(layers: int, depths: int, right: float) -> None:
    groups = side_by_side(place_names(layers, depths), 52, right)
    assert [g.title for g in groups] == ["embed", "layers", "head", *(f"MTP {k}" for k in range(depths))]
    assert groups[0].left == 52
    assert groups[-1].right == pytest.approx(right)
    for before, after in pairwise(groups):
        assert before.left < before.right < after.left
    labels = [x for x, _ in groups[1].numbered()]
    assert all(b - a >= 30 for a, b in pairwise(labels))


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("b", "<i>", raw("<u></u>"), class_="a\"&'<") == '<b class="a&quot;&amp;&#x27;&lt;">&lt;i&gt;<u></u></b>'
    assert join("a\x00", tag("br")) == "a\\x00<br/>"
    assert tag("p", x=1.0, y=2.346, open=True, gone=False, none=None) == '<p x="1" y="2.35" open=""></p>'
