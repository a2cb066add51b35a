"""The HTML report: one file, well-formed, everything in it, nothing in it that runs or loads."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from _results import ALL, HOSTILE, broken, failing, hostile, no_forward, passing, quick, skipped

from mtp_convert.errors import Problem
from mtp_convert.verify.report import html, write_html
from mtp_convert.verify.result import Section, Verification

every = pytest.mark.parametrize("name", ALL)


def page(v: Verification) -> Element:
    """The report, read by a parser that accepts no mistake."""
    return ElementTree.fromstring(html(v))


@cache
def page_of(name: str) -> Element:
    return page(ALL[name]())


def words(element: Element) -> str:
    """Everything that a reader sees, in the order of the page."""
    return " ".join(" ".join(element.itertext()).split())


def shown(v: Verification) -> str:
    body = page(v).find("body")
    assert body is not None
    return words(body)


def table(root: Element, caption: str) -> list[list[str]]:
    """The rows of a table, heads first."""
    (found,) = [t for t in root.iter("table") if t.findtext("caption") == caption]
    return [[words(cell) for cell in row] for row in found.iter("tr")]


def heads_fit(found: Element) -> bool:
    head, *rows = ([*row] for row in found.iter("tr"))
    return all(cell.get("scope") == "col" for cell in head) and all(len(row) == len(head) for row in rows)


class TestEvery:
    """What holds for every report."""

    @every
    def test_tables_have_heads_and_captions(self, name: str) -> None:
        tables = list(page_of(name).iter("table"))
        assert tables
        assert all(heads_fit(t) and t.findtext("caption") for t in tables)

    @every
    def test_pictures_have_a_text(self, name: str) -> None:
        for svg in page_of(name).iter("svg"):
            assert svg.get("aria-label") or svg.get("aria-hidden") == "true"

    @every
    def test_nothing_is_loaded(self, name: str) -> None:
        root = page_of(name)
        for element in root.iter():
            assert element.tag not in {"img", "iframe", "object", "embed", "base", "form", "use", "image", "a"}
            assert "src" not in element.attrib
            assert not [key for key in element.attrib if key.startswith("on") or key == "style"]
            assert element.get("href") in {None, "data:,"}
        assert [s.tag for s in root.iter() if s.text and ("@import" in s.text or "url(" in s.text)] == []

    @every
    def test_one_style_and_one_script_and_both_are_allowed_by_digest(self, name: str) -> None:
        root = page_of(name)
        policy = next(m.attrib["content"] for m in root.iter("meta") if m.get("http-equiv"))
        assert policy.startswith("default-src 'none'; ")
        for kind in ("style", "script"):
            (element,) = root.iter(kind)
            digest = base64.b64encode(hashlib.sha256((element.text or "").encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy

    @every
    def test_no_figure_breaks_a_picture(self, name: str) -> None:
        numbers = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"}
        for element in page_of(name).iter():
            for key in numbers & element.attrib.keys():
                assert math.isfinite(float(element.attrib[key])), (element.tag, key)
            assert not re.search("nan|inf", element.get("d", "") + element.get("transform", ""))


class TestPassing:
    """A run without findings."""

    def test_verdict_first(self) -> None:
        assert shown(passing()).startswith(
            "mtp-convert verify ✓ PASS Both sides compute the same 57 places, each within"
        )

    def test_all_places_in_the_order_they_run(self) -> None:
        v = passing()
        head, *rows = table(page(v), "All places")
        assert [row[0] for row in rows] == [p.place for p in v.places]
        assert head == ["Place", "Result", "Error", "Over threshold", "Threshold", "Floor", "Max abs", "Mean abs",
                        "1 - cosine", "Chained"]  # fmt: skip

    def test_both_tables_of_places_can_be_sorted(self) -> None:
        tables = [t for t in page(passing()).iter("table") if t.get("class") == "sortable"]
        assert [len(list(t.iter("tr"))) for t in tables] == [11, 58]
        for t in tables:
            for row in list(t.iter("tr"))[1:]:
                assert all(math.isfinite(float(cell.attrib["data-key"])) for cell in row)

    def test_levels(self) -> None:
        rows = table(page(passing()), "What was compared, level by level")[1:]
        assert [row[:4] for row in rows[::3]] == [["names", "✓ ok", "458", "0"], ["forward", "✓ ok", "57", "0"]]

    def test_steps(self) -> None:
        rows = table(page(passing()), "Logits of both sides")[1:]
        assert rows[0] == ["main logits", "3.0e-10", "100%", "99.9%", "2.1034 / 2.1034", "—"]
        assert rows[1][0] == "MTP 0 mtp.0.logits"
        assert rows[1][-1] == "71.5% / 71.5%"

    def test_mapping_is_folded(self) -> None:
        root = page(passing())
        folded = {words(d[0]): d.get("open") for d in root.iter("details")}
        assert folded["4 kinds of tensors, 6066 in all"] is None
        assert table(root, "Which tensors of A hold what B holds")[2][1] == "split 3"

    def test_command_and_environment(self) -> None:
        text = shown(passing())
        assert "mtp-convert verify runs/iter_0000100 out/hf --report parity.html" in text
        assert "torch 2.9.1" in text

    def test_command_without_a_record(self) -> None:
        v = replace(passing(), environment={})
        assert "mtp-convert verify runs/iter_0000100 out/hf" in shown(v)

    def test_the_same_bytes_again(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_html(passing(), tmp_path / "new" / f"{name}.html")
        first, second = ((tmp_path / "new" / f"{name}.html").read_bytes() for name in ("a", "b"))
        assert first == second
        assert first.startswith(b"<!DOCTYPE html>\n<html lang=")


class TestFailing:
    """A layer that computes something else."""

    def test_verdict_names_the_place(self) -> None:
        text = shown(failing())
        assert text.startswith(
            "mtp-convert verify ✕ FAIL The sides differ The first place beyond what rounding explains"
        )
        assert "is layers.3. Relative error 0.213" in text

    def test_culprit_with_what_feeds_it(self) -> None:
        (section,) = [s for s in page(failing()).iter("section") if s.get("aria-label") == "Culprit"]
        text = words(section)
        for name in ("layers.3.q", "decoder.layers.3.mlp.router.weight", "model.layers.3.self_attn.o_proj.weight"):
            assert name in text
        assert "mtp-convert explain layers.3.q out/hf" in text

    def test_worst_first(self) -> None:
        _, *rows = table(page(failing()), "Places with the largest error over threshold")
        assert rows[0][:3] == ["layers.3", "✕ beyond", "0.213"]
        assert len(rows) == 10
        assert all(row[1] == "✓ ok" for row in rows[1:])

    def test_findings(self) -> None:
        rows = table(page(failing()), "Findings of level bits")
        assert rows[1] == ["values differ", "layers.3.self_attention.linear_qkv.weight", "sha 1f3a90", "sha 77c2e4"]

    def test_many_findings_are_cut_and_counted(self) -> None:
        many = Section("names", 5000, tuple(Problem(f"tensor {i}") for i in range(1234)))
        root = page(replace(passing(), sections=(many,)))
        assert len(table(root, "Findings of level names")) == 201
        assert "and 1034 more" in words(root)

    def test_a_bad_place_without_a_finding_is_no_pass(self) -> None:
        v = replace(failing(), sections=passing().sections, culprit=None)
        assert not v.ok
        assert "FAIL The sides differ The first place beyond what rounding explains is layers.3." in shown(v)


class TestPartial:
    """What did not run is said."""

    def test_nothing(self) -> None:
        text = shown(skipped())
        assert "NOTHING COMPARED" in text
        assert "PASS" not in text
        assert text.count("the families differ") == 4
        assert "Run: no forward pass, 0.0 s" in text

    def test_no_forward_pass_is_no_pass(self) -> None:
        text = shown(no_forward())
        assert "PARTIAL No difference found, but no forward pass either" in text
        assert "no tree runs this family" in text
        assert "PASS" not in text

    def test_levels_that_were_not_asked_for(self) -> None:
        v = replace(no_forward(), sections=passing().sections[:1])
        assert "Equal in names; not compared: shapes, bits, forward." in shown(v)

    def test_quick(self) -> None:
        text = shown(quick())
        assert "PASS The sampled places compute the same 5 places of a quick run" in text
        assert "chained" not in text.lower()


def test_not_a_number_is_shown() -> None:
    rows = {row[0]: row for row in table(page(broken()), "All places")}
    assert rows["layers.3"][1:4] == ["✕ beyond", "NaN", "inf"]
    assert rows["layers.19"][1:3] == ["✕ beyond", "inf"]
    assert rows["layers.20"][4:6] == ["NaN", "NaN"]
    assert rows["layers.21"][2] == "0"


class TestHostile:
    """Text of a checkpoint is shown, never obeyed."""

    def test_same_elements_as_without(self) -> None:
        counts = [sum(1 for _ in page(v).iter("script")) for v in (hostile(), failing())]
        assert counts == [1, 1]

    def test_shown_as_it_is(self) -> None:
        visible = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        text = shown(hostile())
        assert text.count(visible) > 40
        assert HOSTILE[-1] not in text

    def test_no_markup_of_it(self) -> None:
        assert "<script>alert" not in html(hostile())

    def test_lone_surrogates_can_be_written(self, tmp_path: Path) -> None:
        v = passing()
        write_html(replace(v, a=replace(v.a, path="x\udcff")), tmp_path / "r.html")
        assert "x\\udcff" in (tmp_path / "r.html").read_text(encoding="utf-8")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
class TestBrowser:
    """A real one, with all names unresolvable. The policy forbids every request, and Chromium tells of each refusal."""

    @staticmethod
    def load(report: Path, profile: Path) -> tuple[str, list[str]]:
        """The page after its script has run, and what the browser said about it."""
        assert CHROMIUM is not None
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        options += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command = [CHROMIUM, *options, "--enable-logging=stderr", "--dump-dom", report.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    @pytest.mark.parametrize("name", ["failing", "hostile"])
    def test_asks_for_nothing_and_complains_about_nothing(self, name: str, tmp_path: Path) -> None:
        write_html(ALL[name](), tmp_path / "report.html")
        dom, complaints = self.load(tmp_path / "report.html", tmp_path / "profile")
        assert complaints == []
        assert '<button type="button">Error</button>' in dom, "the script did not run"

    @pytest.mark.parametrize("evil", ["<img src='https://evil.invalid/x'/>", "<script>document.title = 1</script>"])
    def test_what_is_not_ours_would_be_refused_and_noticed(self, evil: str, tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text(html(passing()).replace("<main>", f"<main>{evil}"), encoding="utf-8")
        dom, complaints = self.load(tmp_path / "report.html", tmp_path / "profile")
        assert any("Content Security Policy" in line for line in complaints)
        assert "<title>PASS" in dom
