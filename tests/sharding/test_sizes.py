"""Which ranks have files, what their folders are called, and what folders say about sizes."""

from __future__ import annotations

from math import lcm

import pytest

from mtp_convert.errors import ConvertError
from mtp_convert.sharding.sizes import Rank, Sizes, possible, requested

ALL = [
    Sizes(tensor, pipeline, expert, etp)
    for tensor in (1, 2, 4)
    for pipeline in (1, 3)
    for expert in (1, 2, 3, 4)
    for etp in (1, 2, 4)
    if tensor % etp == 0
]


def processes(s: Sizes) -> list[tuple[int, int, int]]:
    """(tensor, expert, expert-tensor) rank of every process of a stage, counted like Megatron's process groups."""
    count = lcm(s.tensor, s.expert_tensor * s.expert)
    dense = [(t) for _ in range(count // s.tensor) for t in range(s.tensor)]
    experts = [
        (e, x)
        for _ in range(count // (s.expert * s.expert_tensor))
        for e in range(s.expert)
        for x in range(s.expert_tensor)
    ]
    return [(t, e, x) for t, (e, x) in zip(dense, experts, strict=True)]


@pytest.mark.parametrize("s", ALL, ids=str)
def test_every_process_has_its_file_and_no_two_need_different_ones(s: Sizes) -> None:
    ranks = s.ranks()
    wanted = {(t, e): x for t, e, x in processes(s)}
    assert len(wanted) == len({(t, e, x) for t, e, x in processes(s)})  # the file name says the expert-tensor rank
    assert set(ranks) == {Rank(t, p, e) for t, e in wanted for p in range(s.pipeline)}
    assert len(set(map(s.folder, ranks))) == len(ranks)
    assert set(s.saved()) <= set(ranks)
    for rank in ranks:
        assert rank.tensor % s.expert_tensor == wanted[rank.tensor, rank.expert]


@pytest.mark.parametrize(
    ("sizes", "rank", "name"),
    [
        (Sizes(), Rank(0, 0, 0), "mp_rank_00"),
        (Sizes(tensor=16), Rank(12, 0, 0), "mp_rank_12"),
        (Sizes(tensor=2, pipeline=2), Rank(1, 1, 0), "mp_rank_01_001"),
        (Sizes(tensor=2, expert=2), Rank(0, 0, 1), "mp_rank_00_001"),
        (Sizes(tensor=2, pipeline=4, expert=200), Rank(1, 3, 123), "mp_rank_01_003_123"),
    ],
)
def test_folder_names(sizes: Sizes, rank: Rank, name: str) -> None:
    assert sizes.folder(rank) == name


def test_chunks_and_their_keys() -> None:
    assert [Sizes(pipeline=2).key(c) for c in range(2)] == ["model", "model"]
    assert [Sizes(pipeline=2, virtual=3).key(c) for c in range(6)] == [f"model{v}" for v in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (Sizes(tensor=2, expert_tensor=4), "a divisor of the tensor parallel size 2"),
        (Sizes(tensor=4, expert_tensor=3), "a divisor of the tensor parallel size 4"),
        (Sizes(virtual=2), "more than one pipeline stage"),
    ],
)
def test_sizes_that_no_legacy_checkpoint_has(sizes: Sizes, says: str) -> None:
    (problem,) = sizes.problems()
    assert says in problem.line()


def test_experts_are_cut_like_everything_else_unless_told() -> None:
    assert requested({"tensor": 4}) == Sizes(tensor=4, expert_tensor=4)
    assert requested({"tensor": 4, "expert_tensor": 2, "first": 3}) == Sizes(tensor=4, expert_tensor=2)


@pytest.mark.parametrize("s", ALL, ids=str)
def test_sizes_come_back_from_folders(s: Sizes) -> None:
    """All of them where the arguments say them; without arguments the true ones are among the answers."""
    folders = [s.folder(r) for r in s.ranks()]
    sizes = ("tensor", "pipeline", "expert")
    told = {f"{size}_model_parallel_size": getattr(s, size) for size in sizes}
    assert possible(folders, {**told, "expert_tensor_parallel_size": s.expert_tensor}) == [s]
    assert s in possible(folders, {})
    assert s in possible([s.folder(r) for r in s.saved()], {})


def test_two_numbers_are_pipeline_or_expert_ranks() -> None:
    folders = ["mp_rank_00_000", "mp_rank_00_001"]
    assert possible(folders, {}) == [Sizes(pipeline=2), Sizes(expert=2)]
    assert possible(folders, {"pipeline_model_parallel_size": 1}) == [Sizes(expert=2)]
    assert possible(folders, {"expert_model_parallel_size": 1}) == [Sizes(pipeline=2)]


@pytest.mark.parametrize(
    ("folders", "arguments", "says"),
    [
        (["mp_rank_0"], {}, ["mp_rank_0,"]),
        (["mp_rank_00_1"], {}, ["mp_rank_00_1,"]),
        (["mp_rank_xx"], {}, ["mp_rank_xx"]),
        (["mp_rank_00_000_000_000"], {}, ["mp_rank_00_000_000_000"]),
        (["mp_rank_99999"], {}, ["mp_rank_99999"]),
        (["mp_rank_4000_4000_4000"], {}, ["at most 65536 ranks"]),
        (["mp_rank_00", "mp_rank_01_000"], {}, ["mp_rank_01_000"]),
        (["mp_rank_01"], {}, ["folder is missing in mp_rank_00"]),
        (
            [f"mp_rank_0{t}_00{p}" for t in range(2) for p in range(3) if (t, p) not in ((0, 1), (1, 2))],
            {},
            ["missing in mp_rank_00_001", "missing in mp_rank_01_002"],
        ),
        (["mp_rank_00", "mp_rank_01"], {"tensor_model_parallel_size": 4}, ["got 2, expected 4"]),
        (
            ["mp_rank_00_000", "mp_rank_00_001"],
            {"pipeline_model_parallel_size": 4, "expert_model_parallel_size": 8},
            ["pipeline_model_parallel_size", "expert_model_parallel_size"],
        ),
        (
            [f"mp_rank_0{t}_00{e}" for t in range(2) for e in range(2)],
            {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            ["mp_rank_00_001: ", "mp_rank_01_000: "],
        ),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_folders_that_do_not_belong_together(folders: list[str], arguments: dict[str, object], says: list[str]) -> None:
    with pytest.raises(ConvertError) as caught:
        possible(folders, arguments)
    assert caught.value.code == "MTP016"
    text = "\n".join(f"{p.line()}: " for p in caught.value.problems)
    assert all(part in text for part in says), text
