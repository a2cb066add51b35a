"""How layers are divided: even, uneven, in virtual stages, by layout strings; what else lies on which chunk."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_convert.errors import ConvertError
from mtp_convert.sharding.pipeline import Chunk, Split, chunks, parse_layout, pattern_of
from mtp_convert.sharding.sizes import Sizes


def args(layers: int, depths: int = 1, pattern: str = "") -> dict[str, Any]:
    return {"num_layers": layers, "mtp_num_layers": depths, "hybrid_layer_pattern": pattern}


def counts(found: tuple[Chunk, ...]) -> list[int]:
    """Layers per chunk, which must follow each other."""
    assert [n for c in found for n in c.layers] == list(range(found[-1].layers.stop))
    return [len(c.layers) for c in found]


def where(found: tuple[Chunk, ...], part: str) -> list[int]:
    return [i for i, c in enumerate(found) if getattr(c, part)]


@pytest.mark.parametrize(
    ("layers", "sizes", "split", "wanted"),
    [
        (6, Sizes(), Split(), [6]),
        (6, Sizes(pipeline=3), Split(), [2, 2, 2]),
        (8, Sizes(pipeline=2, virtual=2), Split(), [2, 2, 2, 2]),
        (7, Sizes(pipeline=3), Split(first=1), [1, 3, 3]),
        (7, Sizes(pipeline=3), Split(last=1), [3, 3, 1]),
        (9, Sizes(pipeline=4), Split(first=1, last=2), [1, 3, 3, 2]),
        (3, Sizes(pipeline=2), Split(first=1, last=2), [1, 2]),
        # Megatron counts the first stage as a whole: each of its virtual stages has half of 4
        (16, Sizes(pipeline=3, virtual=2), Split(first=4, last=4), [2, 4, 2, 2, 4, 2]),
        (5, Sizes(pipeline=2, virtual=2), Split(layout="Et|tt|t|tmL"), [1, 2, 1, 1]),
        (5, Sizes(pipeline=3), Split(layout="E|t*5|mL"), [0, 5, 0]),
        (4, Sizes(pipeline=4), Split(layout="Ett|t|tm|L"), [2, 1, 1, 0]),
    ],
    ids=str,
)
def test_division(layers: int, sizes: Sizes, split: Split, wanted: list[int]) -> None:
    found = chunks(args(layers), sizes, split)
    assert counts(found) == wanted
    assert where(found, "head") == [len(wanted) - 1]


@pytest.mark.parametrize(
    ("layers", "sizes", "split", "says"),
    [
        (7, Sizes(pipeline=2), Split(), "does not divide num_layers"),
        (8, Sizes(pipeline=4), Split(first=1), "beyond those set"),
        (4, Sizes(pipeline=2), Split(first=3, last=3), "beyond those set"),
        (6, Sizes(pipeline=2), Split(first=3, last=2), "beyond those set"),
        (4, Sizes(pipeline=3), Split(first=2, last=2), "beyond those set"),
        (4, Sizes(), Split(first=2), "more than one pipeline stage"),
        (6, Sizes(pipeline=2, virtual=2), Split(), "2 virtual stages do not divide"),
        (4, Sizes(pipeline=2), Split(layout="Ett|ttmL", first=2), "one of them"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_divided(layers: int, sizes: Sizes, split: Split, says: str) -> None:
    with pytest.raises(ConvertError, match=says) as caught:
        chunks(args(layers), sizes, split)
    assert caught.value.code == "MTP001"


def test_ends_without_mtp() -> None:
    found = chunks(args(4, 0), Sizes(pipeline=2), Split())
    assert [where(found, p) for p in ("embedding", "final_norm", "mtp", "head")] == [[0], [1], [], [1]]


def test_mtp_takes_a_copy_of_the_embedding_along() -> None:
    found = chunks(args(4), Sizes(pipeline=2), Split())
    assert [where(found, p) for p in ("embedding", "final_norm", "mtp", "head")] == [[0, 1], [1], [1], [1]]
    found = chunks(args(4), Sizes(), Split())
    assert [where(found, p) for p in ("embedding", "final_norm", "mtp", "head")] == [[0], [0], [0], [0]]


def test_mtp_on_a_stage_of_its_own() -> None:
    """The final norm stays with the last decoder layer, the output layer on the last stage."""
    found = chunks(args(4, 2), Sizes(pipeline=4), Split(layout="Ett|tt|mm|L"))
    assert [where(found, p) for p in ("embedding", "final_norm", "mtp", "head")] == [[0, 2], [1], [2], [3]]


def test_a_hybrid_model_keeps_its_final_norm_on_the_last_stage() -> None:
    found = chunks(args(2, 1, "M*/*E"), Sizes(pipeline=2), Split(layout="Ett|mL"))
    assert where(found, "final_norm") == [1]


@pytest.mark.parametrize(
    ("sizes", "split", "wanted"),
    [
        (Sizes(), Split(), "M*E-/*E/*E"),
        (Sizes(pipeline=2), Split(), "M*E-/*E/*E"),  # every release divides an even pattern itself
        (Sizes(pipeline=2), Split(first=1), "M|*E-/*E/*E"),
        (Sizes(pipeline=2, virtual=2), Split(), "M|*|E|-/*E/*E"),
        (Sizes(pipeline=2), Split(layout="Et|tttmmL"), "M|*E-/*E/*E"),
    ],
    ids=str,
)
def test_bars_in_a_hybrid_pattern(sizes: Sizes, split: Split, wanted: str) -> None:
    a = args(4, 2, "M*E-/*E/*E")
    assert pattern_of(a, chunks(a, sizes, split), sizes) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("EttmL", "EttmL"),
        ("Ett|ttmL", "Ett|ttmL"),
        ("E, t, t | t, m, L", "Ett|tmL"),
        ("Et*3|t*10mL", "Ettt|ttttttttttmL"),
        ("Ettt|(tt|)*3,m|L", "Ettt|tt|tt|tt|m|L"),
        ("E(t|)*2tmL", "Et|t|tmL"),
        ("E(t*2|)*2mL", "Ett|tt|mL"),
        ("(E|)*1(|t)*2mL", "E||t|tmL"),
    ],
)
def test_layout_strings(text: str, wanted: str) -> None:
    letters = {"embedding": "E", "layer": "t", "mtp": "m", "head": "L"}
    assert "|".join("".join(letters[part] for part in row) for row in parse_layout(text)) == wanted


@pytest.mark.parametrize(
    "text", ["Extt", "E(tt", "E(t)L", "E((t)*2)*2", "E*", "t*x", "t*999999999", "(t*60000)*60000", "E()*3", "*3", ")"]
)
def test_layout_strings_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConvertError, match="pipeline layout") as caught:
        parse_layout(text)
    assert caught.value.code == "MTP001"


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("Ett|tmL|", "3 chunks"),
        ("Ett|tmL", "3 decoder layers"),
        ("Ett|ttL", "0 MTP depths"),
        ("ttE|ttmL", "E elsewhere"),
        ("Ett|ttLm", "L elsewhere"),
        ("Ettm|ttL", "t behind m"),
        ("Ett|ttLmL", "L elsewhere"),
    ],
)
def test_layouts_that_do_not_describe_the_model(layout: str, says: str) -> None:
    with pytest.raises(ConvertError) as caught:
        chunks(args(4), Sizes(pipeline=2), Split(layout=layout))
    assert any(says in p.line() for p in caught.value.problems), caught.value.problems


def test_a_hybrid_model_has_mtp_on_its_last_stage() -> None:
    with pytest.raises(ConvertError, match="hybrid"):
        chunks(args(4, 1, "M*M*/*E"), Sizes(pipeline=3), Split(layout="Ett|ttm|L"))


def test_mtp_in_the_last_round_of_virtual_stages() -> None:
    with pytest.raises(ConvertError, match="last virtual stages"):
        chunks(args(3), Sizes(pipeline=2, virtual=2), Split(layout="Ettt|m||L"))
