"""Annotations and the job's summary: what GitHub reads, and nothing that a checkpoint could say in their place."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from _results import ALL, HOSTILE, failing, hostile, no_forward, passing, quick, skipped

from mtp_convert.errors import Problem
from mtp_convert.verify.github import annotations, code, escape_data, escape_property, plain, publish, step_summary
from mtp_convert.verify.result import Section

COMMAND = re.compile(r"::(?P<kind>error|warning) title=(?P<title>[^:,\r\n]*)::(?P<message>[^\r\n]*)")


def read(line: str) -> tuple[str, str, str]:
    """A workflow command as the runner understands it: kind, title, message."""
    found = COMMAND.fullmatch(line)
    assert found, line
    title = found["title"].replace("%3A", ":").replace("%2C", ",")
    return found["kind"], *(undone(t) for t in (title, found["message"]))


def undone(text: str) -> str:
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def test_escapes() -> None:
    assert escape_data("100%\r\n:,") == "100%25%0D%0A:,"
    assert escape_property("100%\r\n:,") == "100%25%0D%0A%3A%2C"
    assert undone(escape_data("%0A")) == "%0A"


@pytest.mark.parametrize("name", ALL)
def test_every_annotation_is_one_command(name: str) -> None:
    for line in annotations(ALL[name]()):
        read(line)


def test_nothing_to_say() -> None:
    assert annotations(passing()) == []
    assert annotations(quick()) == []


def test_verdict_then_findings() -> None:
    lines = [read(line) for line in annotations(failing())]
    assert [(kind, title) for kind, title, _ in lines] == [
        ("error", "mtp-convert verify: FAIL"),
        ("error", "mtp-convert verify: bits"),
        ("error", "mtp-convert verify: forward"),
    ]
    assert "is layers.3. Relative error 0.213" in lines[0][2]
    assert lines[1][2].startswith("values differ in layers.3.self_attention.linear_qkv.weight: got sha 1f3a90")


def test_what_did_not_run_is_a_warning() -> None:
    for v in (no_forward(), skipped()):
        ((kind, _, message),) = map(read, annotations(v))
        assert kind == "warning"
        assert "compared" in message


@pytest.mark.parametrize(("problems", "lines"), [(10, 10), (11, 11), (99, 11)])
def test_at_most_ten_of_a_level_and_a_count(problems: int, lines: int) -> None:
    section = Section("names", 99, tuple(Problem(f"tensor {i}") for i in range(problems)))
    found = [read(line) for line in annotations(replace(passing(), sections=(section,)))][1:]
    assert len(found) == lines
    if problems > 10:
        assert found[-1][2] in {"and 1 finding more", "and 89 findings more"}


def test_hostile_text_stays_in_its_message() -> None:
    visible = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    found = [read(line) for line in annotations(hostile())]
    assert len(found) == 4
    assert found[1][2] == f"{visible} in {visible}: got {visible}, expected {visible}"


class TestSummary:
    """Markdown."""

    @pytest.mark.parametrize("name", ALL)
    def test_every_table_is_whole(self, name: str) -> None:
        tables = [b.splitlines() for b in step_summary(ALL[name]()).split("\n\n") if b.startswith("|")]
        assert len(tables) >= 2
        for rows in tables:
            assert set(rows[1]) <= set("| -:")
            assert len({row.count("|") for row in rows}) == 1
            assert all(row.startswith("| ") and row.endswith(" |") for row in rows)

    def test_failing(self) -> None:
        text = step_summary(failing())
        assert text.startswith("## ❌ mtp-convert verify: The sides differ\n")
        assert "### First bad place: <code>layers.3</code>" in text
        assert "| forward | ❌ FAIL | 57 | 1 | routing ties broken by A |" in text
        assert "| MTP 0 | 0.166 | 68.7&#37; | " not in text
        assert "| MTP 0 | 0.166 | 68.7% | 94.0% | 71.0% | 51.5% |" in text
        assert "next: <code>mtp-convert explain layers.3.q out/hf</code>" in text

    def test_passing(self) -> None:
        text = step_summary(passing())
        assert text.startswith("## ✅ ")
        assert "next:" not in text

    def test_hostile_text_has_no_meaning(self) -> None:
        text = step_summary(hostile())
        assert "<script" not in text
        assert set(re.findall(r"</?\w+>", text)) == {"<code>", "</code>"}
        visible = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        assert html.unescape(text).count(visible) > 20

    def test_a_name_is_what_it_was(self) -> None:
        assert code("a|b`c*_d") == "<code>a&#124;b&#96;c&#42;&#95;d</code>"
        assert html.unescape(plain("[x](y) <!-- @z")) == "[x](y) <!-- @z"
        assert code("") == ""


def test_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    publish(failing())
    assert capsys.readouterr().out.splitlines() == annotations(failing())
    assert summary.read_text(encoding="utf-8") == "before\n" + step_summary(failing())


def test_publish_outside_of_actions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    publish(failing())
    assert len(capsys.readouterr().out.splitlines()) == 3
