"""The terminal's view: narrow, without colour, through pipes, in ASCII, with hostile names."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace

import pytest
from _results import ALL, broken, failing, hostile, no_forward, passing, quick, skipped

from mtp_convert.render_verify import show_verification
from mtp_convert.verify.result import Verification
from mtp_convert.verify.wording import number, ratio, share, worst_first


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def text(v: Verification, encoding: str = "utf-8") -> str:
    """What stdout gets when it is a pipe."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        show_verification(v)
        stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", ALL)
def test_sixty_columns_without_colour(name: str) -> None:
    lines = text(ALL[name]()).splitlines()
    assert "\x1b" not in "".join(lines)
    *body, following = lines
    assert following.startswith("next")  # to paste, so in one line
    assert max(map(len, body)) <= 60


def test_verdict_first() -> None:
    assert text(passing()).startswith(
        "PASS  Both sides compute the same\n57 places, each within what rounding explains."
    )
    assert text(failing()).startswith("FAIL  The sides differ\n")
    assert text(skipped()).startswith("NOTHING COMPARED  ")
    assert text(no_forward()).startswith("PARTIAL  ")
    assert text(quick()).startswith("PASS  The sampled places compute the same\n")


def test_no_error_at_all_has_no_closest_place() -> None:
    v = passing()
    found = text(replace(v, places=tuple(replace(p, relative=0.0) for p in v.places)))
    assert "every error is exactly 0." in " ".join(found.split())
    assert "Closest" not in found


def test_levels_and_findings() -> None:
    found = text(failing())
    assert "names     ok              458         0\n" in found
    assert "bits      FAIL            458         1\n    - values differ in\n" in found


def test_worst_places_come_first_with_bars() -> None:
    rows = text(failing()).split("\nplace")[1].splitlines()[1:3]
    assert rows[0].split()[:3] == ["layers.3", "FAIL", "0.213"]
    assert rows[1].split()[1] == "ok"
    bars = [row.split()[3] for row in rows]
    assert bars[0].index("|") == bars[1].index("|")
    assert bars[0].count("█") > bars[0].index("|") > bars[1].count("█") > 0


def test_steps() -> None:
    assert "MTP 0          0.166    68.7%    94.0%       71.0%    51.5%\n" in text(failing())


def test_culprit_and_what_to_type_next() -> None:
    found = text(failing())
    assert "first bad place: layers.3\n" in found
    assert "  Feeds it in B model.layers.3.self_attn.q_proj.weight\n" in found
    assert found.endswith("\nnext          mtp-convert explain layers.3.q out/hf\n")


def test_names_that_differ_in_numbers_alone_are_one_line() -> None:
    v = failing()
    assert v.culprit is not None
    experts = tuple(f"layers.3.mlp.experts.{i}.{p}.weight" for i in range(128) for p in ("up", "down"))
    found = text(replace(v, culprit=replace(v.culprit, a=experts, b=experts)))
    assert "  Feeds it      layers.3.mlp.experts.{0..127}.up.weight\n" in found
    assert found.count(".down.weight") == 1
    assert "Feeds it in" not in found


@pytest.mark.parametrize(
    ("v", "following"),
    [
        (passing(), "mtp-convert check out/hf"),
        (quick(), "mtp-convert verify runs/iter_0000100 out/hf"),
        (no_forward(), "mtp-convert diff runs/iter_0000100 out/hf"),
    ],
)
def test_next(v: Verification, following: str) -> None:
    assert text(v).endswith(f" {following}\n")


def test_not_a_number() -> None:
    rows = [line.split() for line in text(broken()).splitlines() if " FAIL " in line][2:]
    assert [row[2] for row in rows] == ["NaN", "inf", "4.3e-07"]
    assert all(row[-1] == "inf" for row in rows)


def test_ascii() -> None:
    found = text(passing(4, 1), "ascii")
    assert "###" in found
    assert "~" in found


def test_colour_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert text(failing()).startswith("\x1b[31mFAIL\x1b[0m  \x1b[1mThe sides differ\x1b[0m\n")


def test_hostile_text_commands_neither_terminal_nor_runner() -> None:
    found = text(hostile())
    assert "\x1b" not in found
    assert "\u202e" not in found
    assert not [line for line in found.splitlines() if line.lstrip().startswith("::")]


def test_a_name_that_is_a_command_is_defused() -> None:
    v = failing()
    assert v.culprit is not None
    v = replace(v, culprit=replace(v.culprit, guess="a ::error::b ##[error]c", a=("x", "::error::y")))
    found = text(v)
    assert not [line for line in found.splitlines() if line.lstrip().startswith("::")]
    assert "\\x3a:error::y" in found
    assert "##[" not in found


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1.234e-7, "1.2e-07"), (0.31, "0.310"), (42, "42.0"), (250.4, "250"), (123456, "1.2e+05"),
     (math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "-inf"), (999.7, "1.0e+03")],
)  # fmt: skip
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(1, "100%"), (0.99999, "99.9%"), (0, "0.0%"), (0.5, "50.0%"), (math.nan, "NaN")]
)
def test_shares_are_rounded_down(value: float, words: str) -> None:
    assert share(value) == words


def test_what_is_no_number_is_worst() -> None:
    worst = worst_first(broken())
    assert [p.place for p in worst[:3]] == ["layers.3", "layers.19", "layers.20"]
    ratios = [ratio(p) for p in worst]
    assert ratios == sorted(ratios, reverse=True)
