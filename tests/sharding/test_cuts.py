"""A rank's share is what the layer's op makes of the shares of its params: cut first and fused then, with numpy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from mtp_convert.mapping.layout import Binding, LayoutError, build
from mtp_convert.mapping.ops import Appended, Concat, Grouped, Op, Same
from mtp_convert.mapping.rules import Block, Param, Placed, rule
from mtp_convert.sharding.cuts import cut_of

Array = NDArray[np.int64]
SHAPES: dict[str, tuple[Op, int, list[tuple[int, ...]]]] = {
    "column": (Same(), 0, [(8, 3)]),
    "row": (Same(), 1, [(3, 8)]),
    "vector": (Same(), 0, [(8,)]),
    "convolution": (Concat(0), 0, [(8, 1, 4), (4, 1, 4), (4, 1, 4)]),
    "gate and up": (Concat(0), 0, [(8, 3), (8, 3)]),
    "mamba projection": (Concat(0), 0, [(8, 3), (8, 3), (4, 3), (4, 3), (12, 3)]),
    "q, k, v": (Grouped(4), 0, [(16, 3), (8, 3), (8, 3)]),
    "q, gate, k, v": (Grouped(4), 0, [(16, 3), (16, 3), (8, 3), (8, 3)]),
    "q, k, v and a gate per head": (Appended(Grouped(4)), 0, [(16, 3), (8, 3), (8, 3), (8, 3)]),
    "q, k, v biases": (Grouped(4), 0, [(16,), (8,), (8,)]),
    "embedding and hidden": (Concat(1), 0, [(8, 3), (8, 3)]),
}


def binding(op: Op, cut: int | None, shapes: list[tuple[int, ...]]) -> tuple[Binding, dict[str, Param]]:
    params = tuple(Param(f"p{i}", shape, cut=cut) for i, shape in enumerate(shapes))
    block = Block(params, {"x": (rule("t", *(p.name for p in params), op=op),)})
    layout = build("x", [Placed(block, "", {"x": ""})], {})
    return layout.bindings["t"], dict(layout.params)


def fused(op: Op, values: list[Array]) -> Array:
    """What the op makes, by the definition of Megatron's layers."""
    if isinstance(op, Appended):
        return np.concatenate([fused(op.of, values[:-1]), values[-1]])
    if isinstance(op, Grouped):
        groups = [v.reshape(op.groups, -1, *v.shape[1:]) for v in values]
        return np.concatenate(groups, axis=1).reshape(-1, *values[0].shape[1:])
    return np.concatenate(values, axis=op.dim) if isinstance(op, Concat) else values[0]


def local(op: Op, n: int) -> Op:
    """The same op on one of `n` ranks, which have a share of the groups."""
    if isinstance(op, Appended):
        return Appended(local(op.of, n))
    return Grouped(op.groups // n) if isinstance(op, Grouped) else op


@pytest.mark.parametrize(("name", "n"), list(product(SHAPES, (1, 2, 4))))
def test_a_rank_holds_what_its_params_make(name: str, n: int) -> None:
    op, dim, shapes = SHAPES[name]
    b, params = binding(op, dim, shapes)
    cut = cut_of(b, params)
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 1 << 30, shape) for shape in shapes]
    whole = fused(op, values)
    assert cut.divides(n)
    for rank in range(n):
        local_op = local(op, n)
        wanted = fused(local_op, [np.split(v, n, axis=dim)[rank] for v in values])
        boxes = [
            whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] for box in cut.boxes(b.shape, rank, n)
        ]
        stored = np.concatenate([box.reshape(-1) for box in boxes])  # boxes follow each other in the file
        assert cut.local(b.shape, n) == wanted.shape
        assert np.array_equal(stored, wanted.reshape(-1))


def test_what_is_not_cut_is_on_every_rank() -> None:
    b, params = binding(Same(), None, [(5, 3)])
    cut = cut_of(b, params)
    assert cut.divides(7)
    assert cut.local((5, 3), 7) == (5, 3)
    assert cut.boxes((5, 3), 6, 7) == (((0, 0), (5, 3)),)


def test_every_part_of_a_fused_tensor_has_to_divide() -> None:
    b, params = binding(Concat(0), 0, [(8, 3), (6, 3)])
    assert cut_of(b, params).divides(2)
    assert not cut_of(b, params).divides(4)
    assert not cut_of(b, params).divides(7)  # 14 rows would


def test_padded_rows_are_cut_as_one() -> None:
    b, params = binding(Same(), 0, [(10, 3)])
    cut = cut_of(b, params, 12)
    assert cut.boxes((12, 3), 1, 4) == (((3, 0), (3, 3)),)


@pytest.mark.parametrize(("op", "cuts"), [(Concat(0), (0, None)), (Concat(1), (1, 1)), (Concat(0), (None, 0))], ids=str)
def test_params_that_no_layer_cuts_together(op: Op, cuts: tuple[int | None, ...]) -> None:
    params = tuple(Param(f"p{i}", (4, 4), cut=cut) for i, cut in enumerate(cuts))
    block = Block(params, {"x": (rule("t", "p0", "p1", op=op),)})
    layout = build("x", [Placed(block, "", {"x": ""})], {})
    with pytest.raises(LayoutError, match="no rule says how"):
        cut_of(layout.bindings["t"], layout.params)
