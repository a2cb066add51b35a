"""Damage made in real tiny checkpoints is measured, and named, in one layout and across two."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from _families import random_folder
from _kit import Cli, Tensors, config_of, convert, golden_config, golden_tensors, hf_folder
from torch import Tensor

from mtp_convert import param_values
from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.difference import ParamDifference, diff, explain_difference, grouped
from mtp_convert.elsewhere import MIXED
from mtp_convert.engine import compare, measure

NAME = "nemotron_d1"
Q, K, V, OUT = (f"mtp.layers.0.mixer.{p}_proj.weight" for p in "qkvo")
ENORM, HNORM = "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight"
EXPERT = "mtp.layers.1.mixer.experts.{}.{}_proj.weight"
Damage = Callable[[Tensors], None]


def on(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """A change of one tensor."""

    def make(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return make


def exchange(*pairs: tuple[str, str]) -> Damage:
    """Tensors that take each other's place."""

    def make(tensors: Tensors) -> None:
        for a, b in pairs:
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return make


def moved_experts(tensors: Tensors) -> None:
    """Experts counted from one."""
    for part in ("up", "down"):
        held = [tensors[EXPERT.format(i, part)] for i in range(8)]
        for i in range(8):
            tensors[EXPERT.format(i, part)] = held[(i + 1) % 8]


def other_blocks(tensors: Tensors) -> None:
    """q, k, v one after another where the reader takes them group by group, and the other way round."""
    q, k, v = (tensors[n] for n in (Q, K, V))
    rows = torch.cat([q, k, v]).reshape(2, -1, q.shape[1])
    for name, part in zip((Q, K, V), rows.split([len(t) // 2 for t in (q, k, v)], dim=1), strict=True):
        tensors[name] = part.reshape(-1, q.shape[1]).contiguous()


def copied(source: str, target: str, tensors: Tensors) -> None:
    tensors[target] = tensors[source].clone()


def flip_bit(bit: int, t: Tensor) -> Tensor:
    raw = t.clone().view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32)
    raw[2, 13] ^= 1 << bit
    return raw.view(t.dtype)


def rotary(t: Tensor) -> Tensor:
    return t.reshape(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)


def fresh(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t.dtype) * t.std()


ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(1))
DAMAGES: dict[str, tuple[Damage, str, set[str]]] = {
    "halves": (on(Q, lambda t: t.roll(16, 0)), "halves of the rows swapped", {"q"}),
    "halves of columns": (on(Q, lambda t: t.roll(16, 1)), "halves of the columns swapped", {"q"}),
    "fusion halves": (on("mtp.layers.0.eh_proj.weight", lambda t: t.roll(32, 1)), "e and h exchanged", {"e", "h"}),
    "transposed": (on(OUT, lambda t: t.T), "transposed", {"o"}),
    "permuted": (on(Q, lambda t: t[ORDER]), "rows permuted", {"q"}),
    "heads": (on(Q, lambda t: t.reshape(4, 8, 32)[[2, 0, 1, 3]].reshape(32, 32)), "blocks of 8 rows permuted", {"q"}),
    "rotary": (on(Q, rotary), "halves of every block of 8 rows interleaved", {"q"}),
    "blocks of QKV": (other_blocks, MIXED, {"q", "k", "v"}),
    "k and v": (exchange((K, V)), "k and v exchanged", {"k", "v"}),
    "norms": (exchange((ENORM, HNORM)), "enorm and hnorm exchanged", {"enorm", "hnorm"}),
    "two experts": (
        exchange(*((EXPERT.format(2, p), EXPERT.format(5, p)) for p in ("up", "down"))),
        "experts exchanged",
        {"up", "down"},
    ),
    "stale": (partial(copied, ENORM, HNORM), "B's hnorm holds A's enorm", {"hnorm"}),
    "offset": (on(ENORM, lambda t: t + 1), "offset +1, as of norms that count from 0 or from 1", {"enorm"}),
    "scale": (on(Q, lambda t: t * 4), "factor 2^2", {"q"}),
    "block scales": (
        on(Q, lambda t: t * torch.exp2(torch.arange(32) % 5 - 2)[:, None]),
        "one factor per row, as of scales",
        {"q"},
    ),
    "sign": (on(Q, torch.neg), "sign flipped", {"q"}),
    "zeroed": (on(Q, torch.zeros_like), "zeroed in B", {"q"}),
    "one head": (on(Q, lambda t: torch.cat([t[:8], t[8:16] * 0, t[16:]])), "only in a run of rows: zeroed in B", {"q"}),
    "bit": (on(Q, partial(flip_bit, 14)), "one bit flipped", {"q"}),
    "fresh": (on(Q, fresh), "unrelated values of the same spread, as of a new initialisation", {"q"}),
}


def pair(scratch: Path, damage: Damage, *, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A golden checkpoint and the same with damage."""
    tensors = {n: t.to(dtype) for n, t in golden_tensors(NAME).items()}
    config = golden_config(NAME)
    whole = hf_folder(scratch / "a", tensors, config)
    damage(tensors)
    return whole, hf_folder(scratch / "b", tensors, config)


def differing(a: Path, b: Path) -> list[ParamDifference]:
    return diff(open_checkpoint(a), open_checkpoint(b)).differing


@pytest.mark.parametrize(
    ("via", "dtype"), [("hf", torch.float32), ("megatron", torch.bfloat16)], ids=["hf", "megatron"]
)
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, via: str, dtype: torch.dtype, tmp_path: Path) -> None:
    damage, what, where = DAMAGES[name]
    a, b = pair(tmp_path, damage, dtype=dtype)
    if via == "megatron":
        convert(a, tmp_path / "m", "megatron")
        a = tmp_path / "m"
    rows = differing(a, b)
    assert {row.guess for row in rows} == {what}
    assert {row.param.rpartition(".")[2] for row in rows} == where
    assert all(row.param.startswith("mtp.0.") for row in rows)
    if name not in ("fresh", "bit"):
        assert {row.fit for row in rows} <= {"exact", "rounding"}


def test_experts_off_by_one(tmp_path: Path) -> None:
    a, b = pair(tmp_path, moved_experts)
    groups = {g.guess: len(g.rows) for g in grouped(differing(a, b))}
    assert groups == {"experts shifted by one: B's i is A's i+1": 14, "experts shifted": 2}


def test_every_type_has_its_cast(tmp_path: Path) -> None:
    a, _ = pair(tmp_path, lambda t: None)
    for name, dtype in (("BF16", "bf16"), ("F16", "fp16")):
        convert(a, tmp_path / dtype, "megatron", dtype=dtype)
        there, back = differing(a, tmp_path / dtype), differing(tmp_path / dtype, a)
        assert {r.guess for r in there} == {f"cast: B is A rounded to {name}"}
        assert {r.guess for r in back} == {f"cast: A is B rounded to {name}"}
        assert len(there) == len(back) > 50


def test_exchange_across_a_cast(tmp_path: Path) -> None:
    """Values that were exchanged and rounded are still found."""
    a, b = pair(tmp_path, exchange((K, V)))
    convert(a, tmp_path / "half", "megatron", dtype="bf16")
    rows = {
        r.param.rpartition(".")[2]: r for r in differing(tmp_path / "half", b) if r.param.startswith("mtp.0.layers.0.")
    }
    assert [(rows[n].guess, rows[n].fit) for n in "kv"] == [("k and v exchanged", "rounding")] * 2
    assert rows["q"].guess == "cast: A is B rounded to BF16"


def test_figures(tmp_path: Path) -> None:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[3, 5], t[3, 7], t[20, 0] = t[3, 5] + 0.5, 0.0, t[20, 0] - 2
        return t

    a, b = pair(tmp_path, on(Q, change))
    (row,) = differing(a, b)
    x = golden_tensors(NAME)[Q].double()
    y = change(golden_tensors(NAME)[Q]).double()
    assert (row.guess, row.a, row.b) == ("a few elements changed", Q, Q)
    assert (row.count, row.share, row.shape, row.first) == (3, 3 / 1024, (32, 32), (3, 5))
    assert row.values == (float(x[3, 5]), float(y[3, 5]))
    assert row.max_abs == float((x - y).abs().max())
    assert row.relative == pytest.approx(float((x - y).abs().max() / x.abs().max()))
    assert row.norms == pytest.approx((float(x.norm()), float(y.norm())))
    assert row.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))


def test_small_changes_are_not_explained(tmp_path: Path) -> None:
    noise = 0.01 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    (row,) = differing(*pair(tmp_path, on(Q, lambda t: t + noise)))
    assert (row.guess, row.detail, row.fit) == ("", "", "")
    assert row.cosine > 0.99


def test_kinds_without_explanation_are_looked_into_a_few_times(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for i in range(8):
            name = EXPERT.format(i, "up")
            tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=generator)

    rows = differing(*pair(tmp_path, change))
    assert [r.detail for r in rows] == [""] * 4 + ["others of its kind were not explained"] * 4


@pytest.mark.parametrize(
    "name", ["halves", "halves of columns", "transposed", "permuted", "rotary", "sign", "one head"]
)
def test_large_params_are_sampled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where a quarter of a param may be in memory, read in parts."""
    monkeypatch.setattr(param_values, "MOST_WHOLE", 256)
    monkeypatch.setattr(param_values, "ELEMENTS", 96)
    monkeypatch.setattr(compare, "ELEMENTS", 100)
    monkeypatch.setattr(measure, "PART", 7)
    damage, what, _ = DAMAGES[name]
    (row,) = differing(*pair(tmp_path, damage))
    assert (row.guess, row.sampled) == (what, True)


def test_some_params_alone(tmp_path: Path) -> None:
    a, b = (open_checkpoint(p) for p in pair(tmp_path, exchange((K, V), (ENORM, HNORM))))
    assert [r.param for r in explain_difference(a, b, ["mtp.0.enorm", "mtp.0.layers.0.q"])] == ["mtp.0.enorm"]
    (row,) = explain_difference(a, b, ["mtp.0.enorm"])
    assert row.guess == "enorm and hnorm exchanged"
    assert explain_difference(a, b, ["no such param"]) == []


class TestCopies:
    """A tensor that is stored twice."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """GLM stores its embedding once more in every MTP depth."""
        source = random_folder("glm4_moe", tmp_path / "source")
        c = open_checkpoint(source)
        tensors = dict(load(source))
        tensors |= {n: tensors[c.layout.home[p][0].tensor].clone() for n, p in c.layout.copies.items()}
        return hf_folder(tmp_path / "a", tensors, config_of(source)), source

    def test_equal_copies_are_no_difference(self, folders: tuple[Path, Path]) -> None:
        a, source = folders
        assert open_checkpoint(a).copies
        assert diff(open_checkpoint(a), open_checkpoint(source)).equal
        assert diff(open_checkpoint(source), open_checkpoint(a)).equal

    def test_a_stale_copy(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        a, source = folders
        tensors = dict(load(a))
        name = sorted(open_checkpoint(a).copies)[0]
        tensors[name] = tensors[name] + 1
        (row,) = differing(hf_folder(tmp_path / "b", tensors, config_of(a)), source)
        assert row.a == name
        assert row.guess == "stale copy: the tensors that are copied are equal"

    def test_a_stale_main_tensor(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        a, source = folders
        c = open_checkpoint(a)
        tensors = dict(load(a))
        name = sorted(c.copies)[0]
        main = c.layout.home[c.layout.copies[name]][0].tensor
        tensors[main] = tensors[main] + 1
        rows = differing(source, hf_folder(tmp_path / "b", tensors, config_of(a)))
        assert [(r.b, r.guess) for r in rows] == [(main, "B's copy holds what A has")]


def load(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class TestOutput:
    """What people and programs read."""

    def test_groups_worst_first(self, cli: Cli, tmp_path: Path) -> None:
        def damage(tensors: Tensors) -> None:
            moved_experts(tensors)
            on(Q, lambda t: t.roll(16, 0))(tensors)
            tensors["lm_head.weight"][5, 6] = float("nan")

        lines = cli("diff", *pair(tmp_path, damage)).out.splitlines()
        assert "18 differences" in lines[0]
        starts = [line for line in lines if not line.startswith(" ")][1:]
        assert starts == [
            "B is not finite where they differ",
            "14 params: experts shifted by one: B's i is A's i+1 (to the bit), e.g.",
            "2 params: experts shifted (to the bit), e.g.",
            "halves of the rows swapped (to the bit)",
        ]
        assert any("mtp.0.layers.1.experts.{0..6}.up x7" in line for line in lines)
        assert any("first at [5, 6]" in line and "nan" in line for line in lines)

    def test_json_has_numbers_alone(self, cli: Cli, tmp_path: Path) -> None:
        def damage(tensors: Tensors) -> None:
            tensors[Q][1, 2] = float("inf")

        def refuse(name: str) -> None:
            raise AssertionError(name)

        got = cli("diff", *pair(tmp_path, damage), "--format", "json")
        (row,) = json.loads(got.out, parse_constant=refuse)["differing"]
        assert (row["first"], row["max_abs"], row["count"]) == ([1, 2], None, 1)
        assert row["values"][1] is None
