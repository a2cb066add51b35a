"""Rows as a tree."""

from mtp_convert import tree
from mtp_convert.summary import collapse


def drawn(*names: str) -> list[str]:
    rows = collapse((name, 10, ("F32", (2,))) for name in names)
    return ["  " * line.depth + f"{line.name} {line.nbytes}" for line in tree.lines(rows)]


def test_indices_stay_with_what_they_count() -> None:
    assert tree.words("model.layers.{0..3,7}.mlp.experts.5.w1.weight") == [
        "model",
        "layers.{0..3,7}",
        "mlp",
        "experts.5",
        "w1",
        "weight",
    ]


def test_what_names_share_is_said_once_with_its_size() -> None:
    assert drawn("embed.weight", *(f"layers.{i}.{leaf}" for i in range(3) for leaf in ("a.weight", "b.w", "b.x"))) == [
        "embed.weight 10",
        "layers.{0..2} 90",
        "  a.weight 30",
        "  b 60",
        "    w 30",
        "    x 30",
    ]


def test_a_name_that_begins_another_and_equal_names_of_two_shapes() -> None:
    rows = collapse([("a.b", 1, ("F32", (2,))), ("a.b.c", 2, ("F32", (2,))), ("a.b", 4, ("F32", (3,)))])
    found = list(tree.lines(rows))
    assert [(line.depth, line.name, line.nbytes) for line in found] == [
        (0, "a", 7),
        (1, "b", 1),
        (1, "b.c", 2),
        (1, "b", 4),
    ]


def test_flat_keeps_whole_names() -> None:
    rows = collapse((f"layers.{i}.a", 1, ()) for i in range(2))
    assert [line.name for line in tree.flat(rows)] == ["layers.{0..1}.a"]
