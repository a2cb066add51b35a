"""`clip`, `join` and `clip_block` against enumeration of every element."""

from itertools import product

import pytest
from _cells import cells, copies
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_convert.mapping.ops import Concat, Grouped, Permute
from mtp_convert.mapping.views import Axis, Block, Shape, View, clip, clip_block, join, whole

Grid = tuple[Shape, Shape, int]


@st.composite
def nested_grids(draw: st.DrawFn) -> Grid:
    """Sizes, steps that nest like the digits of a number in any axis order (some 0), and a start."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    steps = [0] * len(sizes)
    reach = 0
    for axis in draw(st.permutations(range(len(sizes)))):
        if draw(st.booleans()):
            steps[axis] = reach + draw(st.integers(1, 5))
            reach += max(sizes[axis] - 1, 0) * steps[axis]
    return tuple(sizes), tuple(steps), draw(st.integers(-5, 40))


def positions(origin: Shape, sizes: Shape) -> list[Shape]:
    return list(product(*(range(o, o + n) for o, n in zip(origin, sizes, strict=True))))


@given(nested_grids(), st.integers(-10, 120), st.integers(0, 80))
def test_clip_finds_exactly_the_positions_in_the_interval(grid: Grid, lo: int, length: int) -> None:
    sizes, steps, start = grid
    hi = lo + length
    boxes = list(clip(sizes, steps, start, lo, hi))
    assert not any(0 in box for _, box in boxes)
    found = [p for box in boxes for p in positions(*box)]
    wanted = [
        p
        for p in positions((0,) * len(sizes), sizes)
        if lo <= start + sum(i * s for i, s in zip(p, steps, strict=True)) < hi
    ]
    assert sorted(found) == wanted


def test_clip_cuts_a_long_run_into_at_most_two_partial_rows_and_a_middle() -> None:
    boxes = list(clip((1000, 1000), (1000, 1), 0, 1500, 998_500))
    assert sorted(boxes) == [((1, 500), (1, 500)), ((2, 0), (996, 1000)), ((998, 0), (1, 500))]


@st.composite
def two_views(draw: st.DrawFn) -> tuple[View, View]:
    """A param of shape [rows, columns] placed by two ops."""
    rows, columns = 2 * draw(st.integers(1, 6)), draw(st.integers(1, 5))
    shape = (rows, columns)
    groups = [g for g in (1, 2, rows // 2, rows) if rows % g == 0]

    def placed() -> View:
        kind = draw(st.sampled_from(["whole", "rows", "columns", "grouped", "transposed", "under"]))
        if kind == "rows":
            return Concat(0).place([(3, columns), shape])[1][1]
        if kind == "columns":
            return Concat(1).place([(rows, 2), shape, (rows, 1)])[1][1]
        if kind == "grouped":
            g = draw(st.sampled_from(groups))
            return Grouped(g).place([(g, columns), shape, (2 * g, columns)])[1][1]
        if kind == "transposed":
            return Permute((1, 0)).place([shape])[1][0]
        return whole(shape).under(2).under(1) if kind == "under" else whole(shape)

    return placed(), placed()


def nests(views: tuple[View, View]) -> bool:
    try:
        join(*views)
    except ValueError:
        return False
    return True


@given(two_views())
def test_join_pairs_the_elements_of_one_param(views: tuple[View, View]) -> None:
    if not nests(views):  # groups of 2 and of 3 rows, say: refused, and only that
        sizes = [next(a.size for a in v.axes if a.size > 1 and a.dim == len(v.start) - 2) for v in views]
        assert max(sizes) % min(sizes)
        return
    assert list(copies(join(*views))) == list(zip(cells(views[0]), cells(views[1]), strict=True))


def test_join_refuses_views_that_do_not_nest() -> None:
    two, three = (Grouped(g).place([(6, 1)])[1][0] for g in (2, 3))
    with pytest.raises(ValueError, match="do not nest"):
        join(two, three)


def test_join_refuses_views_of_different_size() -> None:
    with pytest.raises(ValueError, match="different size"):
        join(whole((4, 2)), whole((2,)))


@settings(max_examples=200)
@given(two_views(), st.sampled_from(["source", "target"]), st.data())
def test_clip_block_keeps_the_copies_inside_the_box(views: tuple[View, View], end: str, data: st.DataObject) -> None:
    if not nests(views):
        return
    block = join(*views)
    every = list(copies(block))
    side = 0 if end == "source" else 1
    top = [max(c[d] for c in (pair[side] for pair in every)) + 1 for d in range(len(views[side].start))]
    offset = tuple(data.draw(st.integers(0, n)) for n in top)
    sizes = tuple(data.draw(st.integers(0, n + 1)) for n in top)
    found = [c for part in clip_block(block, end, offset, sizes) for c in copies(part)]
    inside = [c for c in every if all(o <= x < o + n for x, o, n in zip(c[side], offset, sizes, strict=True))]
    assert sorted(found) == sorted(inside)


def test_narrow_moves_both_ends() -> None:
    block = join(Permute((1, 0)).place([(4, 3)])[1][0], whole((4, 3)))
    part = block.narrow((1, 2), (2, 1))
    assert list(copies(part)) == [((2, 1), (1, 2)), ((2, 2), (2, 2))]


def test_view_moves() -> None:
    view = View((0, 5), (Axis(2, 0, 3), Axis(4, 1, 1)))
    assert view.shifted(1, 10).start == (0, 15)
    assert view.under(7) == View((7, 0, 5), (Axis(2, 1, 3), Axis(4, 2, 1)))
    assert isinstance(join(whole(()), whole(())), Block)
