"""Building layouts: the exact-cover check, stacking, spellings, copies and objects."""

import numpy as np
import pytest
from _cells import numbered, stored

from mtp_convert.mapping.layout import Layout, LayoutError, build
from mtp_convert.mapping.ops import Concat, Grouped
from mtp_convert.mapping.plan import make_plan
from mtp_convert.mapping.rules import Block, Copy, Extra, Param, Placed, Row, Tied, rule

E, LAYERS = 3, 2


def at_root(params: list[Param], *rows: Row) -> list[Placed]:
    return [Placed(Block(tuple(params), {"x": rows}), "", {"x": ""})]


def built(params: list[Param], *rows: Row) -> Layout:
    return build("x", at_root(params, *rows), {})


A, B = Param("a", (4, 2)), Param("b", (2, 2))


def test_a_layout_lists_tensors_shapes_and_homes() -> None:
    layout = built([A, B], rule("ab", "a", "b", op=Concat(0)))
    assert {n: b.shape for n, b in layout.bindings.items()} == {"ab": (6, 2)}
    assert layout.home["b"][1].start == (4, 0)
    assert layout.params.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("params", "rows", "message"),
    [
        ([A], [rule("t", "a"), rule("u", "a")], r"x: param 'a' is in 't' and in 'u'"),
        ([A, B], [rule("t", "a")], r"x: no tensor holds b \(1 in all\)"),
        ([A], [rule("t", "a", "b", op=Concat(0))], r"t: 'b'"),
        ([A, B], [rule("t", "a"), rule("t", "b")], r"x: tensor 't' is written by two rules"),
        ([A, A], [rule("t", "a")], r"param 'a' is declared twice"),
        ([A, Param("b", (2, 3))], [rule("t", "a", "b", op=Concat(0))], r"t: cannot concatenate"),
        ([A, B], [rule("t", "a", "b", op=Grouped(4))], r"t: rows of .* do not divide into 4 groups"),
        ([A, B], [rule("t", "a", "b")], r"t: too many values to unpack"),
        ([A, A], [], r"declared twice"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(params: list[Param], rows: list[Row], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        built(params, *rows)


def test_a_stack_of_unequal_params_does_not_tile() -> None:
    block = Block(
        (Param("e.{e}", (2, 2)), Param("odd", (1, 2))), {"x": (rule("t", "e.{e}", over=("e",)),)}, {"e": [0, 1]}
    )
    placed = [Placed(block, "", {"x": ""})]
    with pytest.raises(LayoutError, match="no tensor holds odd"):
        build("x", placed, {})


def test_one_param_over_several_positions_is_in_two_places() -> None:
    block = Block((A,), {"x": (rule("t", "a", over=("e",)),)}, {"e": [0, 1]})
    with pytest.raises(LayoutError, match="param 'a' is in 't' and in 't'"):
        build("x", [Placed(block, "", {"x": ""})], {})


def test_parts_that_leave_a_hole_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op leaves a hole; a broken one must be noticed."""

    def holed(op: Concat, shapes: list[tuple[int, ...]]) -> object:
        shape, views = place(op, shapes)
        return (shape[0] + 1, *shape[1:]), views

    place = Concat.place
    monkeypatch.setattr(Concat, "place", holed)
    with pytest.raises(LayoutError, match=r"the params of 't' do not tile its shape \(7, 2\)"):
        built([A, B], rule("t", "a", "b", op=Concat(0)))


def test_parts_that_overlap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlapping(op: Concat, shapes: list[tuple[int, ...]]) -> object:
        shape, views = place(op, shapes)
        return shape, (views[0], views[0])

    place = Concat.place
    monkeypatch.setattr(Concat, "place", overlapping)
    with pytest.raises(LayoutError, match="do not tile"):
        built([A, Param("b", (4, 2))], rule("t", "a", "b", op=Concat(0)))


def moe_places(layers: int = LAYERS, experts: int = E) -> list[Placed]:
    """Layers of experts; `per` names every expert, `stack` stacks them."""
    block = Block(
        (Param("e.{e}.up", (2, 3)), Param("gate", (experts, 3))),
        {
            "per": (rule("e.{e}.up", "e.{e}.up"), rule("gate", "gate")),
            "stack": (rule("up", "e.{e}.up", over=("e",)), rule("gate", "gate"), Extra("up._extra_state", ("e",))),
        },
        {"e": range(experts)},
    )
    prefixes = {"per": "layers.{i}.", "stack": "{root}layers.{i}."}
    return [Placed(block, "layers.{i}.", prefixes, {"i": i}, stack="i") for i in range(layers)]


def test_experts_are_stacked_in_front() -> None:
    layout = build("stack", moe_places(), {"root": "m."})
    assert layout.bindings["m.layers.1.up"].shape == (E, 2, 3)
    assert layout.bindings["m.layers.1.up"].stacked == 1
    params = numbered(layout)
    wanted = np.stack([params[f"layers.1.e.{e}.up"] for e in range(E)])
    assert np.array_equal(stored(layout, params)["m.layers.1.up"], wanted)
    assert [o for o in layout.objects if "layers.1" in o] == [
        f"m.layers.1.up._extra_state/shard_{e}_{E}" for e in range(E)
    ]


def test_decoder_stacked_stacks_layers_in_front_of_experts() -> None:
    layout = build("stack", moe_places(), {"root": "", "decoder": "stacked"})
    assert {n: (b.shape, b.stacked) for n, b in layout.bindings.items()} == {
        "layers.up": ((LAYERS, E, 2, 3), 2),
        "layers.gate": ((LAYERS, E, 3), 1),
    }
    params = numbered(layout)
    wanted = np.stack([np.stack([params[f"layers.{i}.e.{e}.up"] for e in range(E)]) for i in range(LAYERS)])
    assert np.array_equal(stored(layout, params)["layers.up"], wanted)
    assert layout.objects[0] == "layers.up._extra_state/shard_0.0_2.3"
    assert layout.objects[-1] == "layers.up._extra_state/shard_1.2_2.3"


def test_unequal_layers_cannot_be_stacked() -> None:
    places = [*moe_places(1), *moe_places(2, experts=E + 1)[1:]]
    assert build("stack", places, {"root": "", "decoder": "per_layer"}).bindings
    with pytest.raises(LayoutError, match="stack: layers of different kinds cannot be stacked"):
        build("stack", places, {"root": "", "decoder": "stacked"})


def test_copies_name_a_param_and_take_its_form() -> None:
    layout = built([Param("a", (4, 2), vocab=True)], rule("t", "a"), Copy("again", "a"), Extra("t._extra_state"))
    assert layout.copies == {"again": "a"}
    assert layout.copy_binding("again").shape == (4, 2)
    assert layout.copy_binding("again").vocab
    assert layout.objects == ("t._extra_state/shard_0_1",)


def test_a_tied_param_lies_where_the_other_one_does() -> None:
    layout = built([A, Param("again", A.shape)], rule("t", "a"), Tied("again", "a"))
    assert layout.bindings.keys() == {"t"}
    assert layout.home["again"] == layout.home["a"]
    assert layout.tied == {"again": "a"}


def test_a_tensor_of_a_tied_param_is_a_copy_of_the_other_one() -> None:
    source = built([A, Param("again", A.shape)], rule("t", "a"), Tied("again", "a"))
    target = built([A, Param("again", A.shape)], rule("t", "a"), rule("u", "again"))
    assert [(s.tensor, s.sources, s.op) for s in make_plan(source, target).steps] == [
        ("t", ("t",), "copy"),
        ("u", ("t",), "rename"),
    ]


def test_a_tied_param_of_another_place_is_named_in_full() -> None:
    ends = Placed(Block((A,), {"x": (rule("t", "a"),)}), "", {"x": ""})
    depth = Placed(Block((Param("own", A.shape),), {"x": (Tied("own", "a"),)}), "mtp.{k}.", {"x": "m.{k}."}, {"k": 3})
    assert build("x", [ends, depth], {}).tied == {"mtp.3.own": "a"}
    assert build("x", [depth], {}).home == {}  # a part of the model, without the place of the other one


@pytest.mark.parametrize("rows", [[rule("t", "a"), rule("u", "b"), Tied("b", "a")], [rule("t", "a"), Tied("b", "a")]])
def test_a_param_that_cannot_be_tied_is_refused(rows: list[Row]) -> None:
    """It is stored on its own, or has another shape."""
    with pytest.raises(LayoutError, match="x: 'b' cannot be tied to 'a'"):
        built([A, B], *rows)


def test_flags_of_params_reach_the_tensor() -> None:
    high = Param("h", (2, 2), high_precision=True)
    layout = built([high, B], rule("mixed", "h", "b", op=Concat(0)))
    assert not layout.bindings["mixed"].high_precision  # only when every part is
    assert built([high], rule("t", "h")).bindings["t"].high_precision
