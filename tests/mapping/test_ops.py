"""Every op against plain numpy, for random params: same tensor, and views that cover it exactly once."""

from collections.abc import Sequence

import numpy as np
import pytest
from _cells import Array, cells
from hypothesis import given
from hypothesis import strategies as st

from mtp_convert.mapping.ops import Appended, Concat, Grouped, Op, Permute, Same
from mtp_convert.mapping.views import Shape

dims = st.integers(1, 4)
shapes = st.lists(dims, min_size=1, max_size=3).map(tuple)


def arrays(wanted: Sequence[Shape]) -> list[Array]:
    """Arrays of these shapes in which no number occurs twice."""
    starts = np.cumsum([1, *(int(np.prod(s)) for s in wanted)])
    return [np.arange(a, a + int(np.prod(s))).reshape(s) for a, s in zip(starts, wanted, strict=False)]


def laid_out(op: Op, params: Sequence[Array]) -> Array:
    """The tensor that the op's views describe; every element must be written exactly once."""
    shape, views = op.place([p.shape for p in params])
    tensor, written = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    assert len(views) == len(params)
    for param, view in zip(params, views, strict=True):
        for at, value in zip(cells(view), param.flat, strict=True):
            tensor[at] = value
            written[at] += 1
    assert written.min() == written.max() == 1
    return tensor


@given(shapes)
def test_same(shape: Shape) -> None:
    (param,) = arrays([shape])
    assert np.array_equal(laid_out(Same(), [param]), param)


@given(shapes, st.data())
def test_concat(shape: Shape, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(dims, min_size=1, max_size=4))
    params = arrays([(*shape[:dim], n, *shape[dim + 1 :]) for n in sizes])
    assert np.array_equal(laid_out(Concat(dim), params), np.concatenate(params, axis=dim))


@given(st.integers(1, 4), st.lists(dims, min_size=1, max_size=4), st.lists(dims, max_size=2))
def test_grouped_is_one_interleave_per_group(groups: int, rows: list[int], rest: list[int]) -> None:
    params = arrays([(groups * r, *rest) for r in rows])
    split = [p.reshape(groups, -1, *rest) for p in params]
    wanted = np.concatenate([part[g] for g in range(groups) for part in split])
    assert np.array_equal(laid_out(Grouped(groups), params), wanted)


def test_grouped_is_what_megatron_calls_qkv() -> None:
    heads, kv, head, hidden = 6, 2, 2, 3
    q, k, v = arrays([(heads * head, hidden), (kv * head, hidden), (kv * head, hidden)])
    shaped = (q.reshape(kv, heads // kv, head, hidden), k.reshape(kv, 1, head, hidden), v.reshape(kv, 1, head, hidden))
    assert np.array_equal(laid_out(Grouped(kv), [q, k, v]), np.concatenate(shaped, axis=1).reshape(-1, hidden))


@given(st.integers(1, 3), st.lists(dims, min_size=1, max_size=3), dims, st.lists(dims, max_size=2))
def test_appended_rows_come_last(groups: int, rows: list[int], more: int, rest: list[int]) -> None:
    params = arrays([*((groups * r, *rest) for r in rows), (more, *rest)])
    wanted = np.concatenate([laid_out(Grouped(groups), params[:-1]), params[-1]])
    assert np.array_equal(laid_out(Appended(Grouped(groups)), params), wanted)


@given(shapes, st.data())
def test_permute(shape: Shape, data: st.DataObject) -> None:
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    (param,) = arrays([shape])
    assert np.array_equal(laid_out(Permute(order), [param]), param.transpose(order))


@pytest.mark.parametrize(
    ("op", "bad", "message"),
    [
        (Concat(0), [(2, 3), (2, 4)], "cannot concatenate"),
        (Concat(1), [(2, 3), (3, 3)], "cannot concatenate"),
        (Grouped(2), [(4, 3), (3, 3)], "do not divide into 2 groups"),
        (Grouped(2), [(2, 3), (2, 2), (2, 4)], "different columns"),  # the volumes alone would agree
        (Same(), [(2,), (2,)], "unpack"),
        (Permute((1, 0)), [(2, 3), (2, 3)], "unpack"),
        (Appended(Same()), [(2, 3), (1, 4)], "cannot append"),
        (Appended(Same()), [(2, 3)], "unpack"),
    ],
)
def test_params_that_an_op_cannot_place(op: Op, bad: list[Shape], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.place(bad)
