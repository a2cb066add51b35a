"""Plans between two small layouts: what every step is called, where it reads, and what it computes."""

import numpy as np
import pytest
from _cells import Array, carried_out, numbered, stored

from mtp_convert.mapping.layout import Layout, build
from mtp_convert.mapping.ops import Concat, Grouped, Permute
from mtp_convert.mapping.plan import Plan, covered, make_plan
from mtp_convert.mapping.rules import Block, Copy, Param, Placed, rule

LAYERS, E = 2, 3


def places() -> list[Placed]:
    """A model with every relation between the layouts `fine` and `fused`."""
    root = Block(
        (Param("embedding", (5, 4), vocab=True), Param("norm", (4,)), Param("turn", (2, 6))),
        {
            "fine": (
                rule("embedding", "embedding"),
                rule("norm", "norm"),
                rule("turn", "turn"),
                Copy("head", "embedding"),
            ),
            "fused": (
                rule("word.embedding", "embedding"),
                rule("norm", "norm"),
                rule("turned", "turn", op=Permute((1, 0))),
            ),
        },
    )
    layer = Block(
        (
            *(Param(n, (rows, 4)) for n, rows in (("q", 8), ("k", 4), ("v", 4), ("gate", 3), ("up", 3))),
            Param("e.{e}", (2, 4)),
        ),
        {
            "fine": (*(rule(n, n) for n in ("q", "k", "v", "gate", "up")), rule("e.{e}", "e.{e}")),
            "fused": (
                rule("qkv", "q", "k", "v", op=Grouped(2)),
                rule("fc1", "gate", "up", op=Concat(0)),
                rule("experts", "e.{e}", over=("e",)),
            ),
        },
        {"e": range(E)},
    )
    names = {"fine": "layers.{i}.", "fused": "decoder.{i}."}
    return [
        Placed(root, "", {"fine": "", "fused": ""}),
        *(Placed(layer, "layers.{i}.", names, {"i": i}, stack="i") for i in range(LAYERS)),
    ]


def layouts() -> tuple[Layout, Layout, Layout]:
    return (
        build("fine", places(), {}),
        build("fused", places(), {}),
        build("fused", places(), {"decoder": "stacked"}),
    )


def words(plan: Plan) -> dict[str, str]:
    return {s.tensor: s.op for s in plan.steps}


@pytest.mark.parametrize(("a", "b"), [(a, b) for a in range(3) for b in range(3)])
def test_every_step_computes_the_target(a: int, b: int) -> None:
    source, target = layouts()[a], layouts()[b]
    params = numbered(source)
    tensors, wanted = stored(source, params), stored(target, params)
    plan = make_plan(source, target)
    assert [s.tensor for s in plan.steps] == list(target.bindings)
    for step in plan.steps:
        assert np.array_equal(carried_out(step, tensors), wanted[step.tensor]), step.tensor


def test_words_of_the_steps() -> None:
    fine, fused, stacked = layouts()
    assert words(make_plan(fine, fine))["norm"] == "copy"
    there = words(make_plan(fine, fused))
    assert there["word.embedding"] == "rename"
    assert there["norm"] == "copy"
    assert there["decoder.0.qkv"] == "fuse 3"
    assert there["decoder.0.fc1"] == "fuse 2"
    assert there["decoder.1.experts"] == f"stack {E}"
    back = words(make_plan(fused, fine))
    assert back["layers.0.q"] == "split"
    assert back["layers.1.e.2"] == "unstack"
    assert words(make_plan(fine, stacked))["decoder.experts"] == f"stack {LAYERS * E}"


def test_sources_are_listed_once_in_order_of_use() -> None:
    fine, fused, _ = layouts()
    steps = {s.tensor: s.sources for s in make_plan(fine, fused).steps}
    assert steps["decoder.1.qkv"] == ("layers.1.q", "layers.1.k", "layers.1.v")
    back = {s.tensor: s.sources for s in make_plan(fused, fine).steps}
    assert back["layers.1.k"] == ("decoder.1.qkv",)


def test_equal_fused_tensors_are_one_copy() -> None:
    _, fused, _ = layouts()
    for step in make_plan(fused, fused).steps:
        (origin,) = step.origins((0,) * len(step.shape), step.shape)
        assert origin.tensors == (step.tensor,)
        assert origin.block.sizes == step.shape


def test_equal_params_in_another_order_are_no_copy() -> None:
    """Same params, same shape, other interleave: the case in which a plain copy would be silently wrong."""
    block = Block(
        (Param("q", (4, 2)), Param("k", (2, 2))),
        {"flat": (rule("t", "q", "k", op=Concat(0)),), "grouped": (rule("t", "q", "k", op=Grouped(2)),)},
    )
    flat, grouped = (build(n, [Placed(block, "", {n: ""})], {}) for n in ("flat", "grouped"))
    params = numbered(flat)
    for source, target in ((flat, grouped), (grouped, flat)):
        (step,) = make_plan(source, target).steps
        assert step.op not in ("copy", "rename")
        assert np.array_equal(carried_out(step, stored(source, params)), stored(target, params)["t"])


def test_one_chunk_of_a_stack_reads_only_its_own_params() -> None:
    fine, _, stacked = layouts()
    step = next(s for s in make_plan(fine, stacked).steps if s.tensor == "decoder.experts")
    origins = list(step.origins((1, 2, 0, 0), (1, 1, 2, 4)))
    assert [o.tensors for o in origins] == [("layers.1.e.2",)]


def test_padding_adds_rows_and_is_not_covered() -> None:
    fine, fused, _ = layouts()
    plan = make_plan(fine, fused, padded={"word.embedding": 8})
    step = plan.steps[0]
    assert (step.tensor, step.shape, step.binding.shape) == ("word.embedding", (8, 4), (5, 4))
    assert not covered(step)
    assert all(covered(s) for s in plan.steps[1:])
    params = numbered(fine)
    wanted = np.concatenate([params["embedding"], np.zeros((3, 4), dtype=np.int64)])
    assert np.array_equal(carried_out(step, stored(fine, params)), wanted)


def test_copies_are_written_on_request() -> None:
    fine, fused, _ = layouts()
    assert "head" not in words(make_plan(fused, fine))
    plan = make_plan(fused, fine, copies=frozenset({"head"}))
    (step,) = [s for s in plan.steps if s.tensor == "head"]
    assert step.sources == ("word.embedding",)
    assert step.op == "rename"


def first(param: str) -> tuple[str, ...]:
    return (param.replace("layers.1.", "layers.0."),)


def both(param: str) -> tuple[str, ...]:
    if not param.startswith("layers."):
        return (param,)
    return tuple(f"layers.{i}.{param.split('.', 2)[2]}" for i in range(LAYERS))


@pytest.mark.parametrize("target_index", [0, 1])
def test_an_alias_takes_params_from_elsewhere(target_index: int) -> None:
    fine, fused, _ = layouts()
    target = (fine, fused)[target_index]
    params = numbered(fine)
    aliased = {name: params[first(name)[0]] for name in params}
    wanted = stored(target, aliased)
    for step in make_plan(fine, target, alias=first).steps:
        assert np.array_equal(carried_out(step, stored(fine, params)), wanted[step.tensor]), step.tensor


@pytest.mark.parametrize("target_index", [0, 1])
def test_an_alias_with_several_params_is_their_mean(target_index: int) -> None:
    fine, fused, _ = layouts()
    target = (fine, fused)[target_index]
    params = numbered(fine)

    def total(name: str) -> Array:
        return np.sum([params[p] for p in both(name)], axis=0)

    wanted = stored(target, {name: total(name) for name in params})
    steps = {s.tensor: s for s in make_plan(fine, target, alias=both).steps}
    for step in steps.values():  # `carried_out` adds what the engine averages
        assert np.array_equal(carried_out(step, stored(fine, params)), wanted[step.tensor]), step.tensor
    assert steps["norm"].averaged == 1
    layer = steps["layers.0.q" if target_index == 0 else "decoder.0.qkv"]
    assert (layer.averaged, layer.op) == (2, "mean of 2")
