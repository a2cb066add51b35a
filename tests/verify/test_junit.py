"""JUnit XML, read back as CI servers do."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from _results import ALL, HOSTILE, broken, failing, hostile, passing, skipped

from mtp_convert.errors import Problem
from mtp_convert.verify.junit import junit_xml
from mtp_convert.verify.result import LEVELS, Section, Verification

# junit-10.xsd of Jenkins' xUnit plugin: element -> (its attributes, those it must have, its children)
SCHEMA = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set(), {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "package", "hostname", "timestamp"},
        {"name", "tests"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": ({"name", "classname", "time"}, {"name", "classname"}, {"skipped", "failure", "error", "system-out"}),
    "failure": ({"type", "message"}, set(), set()),
    "skipped": ({"type", "message"}, set(), set()),
    "system-out": (set(), set(), set()),
}


def check(element: Element) -> None:
    may, must, children = SCHEMA[element.tag]
    assert must <= element.attrib.keys() <= may
    for child in element:
        assert child.tag in children
        check(child)


def suites(v: Verification) -> dict[str, Element]:
    root = ElementTree.fromstring(junit_xml(v))
    return {s.attrib["name"].rpartition(".")[2]: s for s in root}


@pytest.mark.parametrize("name", ALL)
def test_schema_and_counts(name: str) -> None:
    root = ElementTree.fromstring(junit_xml(ALL[name]()))
    check(root)
    for suite in root:
        for word, tag in (("tests", "."), ("failures", "failure"), ("skipped", "skipped")):
            found = sum(case.find(tag) is not None for case in suite.findall("testcase"))
            assert int(suite.attrib[word]) == found
    for word in ("tests", "failures"):
        assert int(root.attrib[word]) == sum(int(s.attrib[word]) for s in root)
    names = [(c.attrib["classname"], c.attrib["name"]) for c in root.iter("testcase")]
    assert len(names) == len(set(names))


def test_a_suite_per_level_and_a_case_per_place() -> None:
    found = suites(passing())
    assert tuple(found) == LEVELS
    assert [len(s) for s in found.values()] == [1, 1, 1, 58]
    places = [(c.attrib["classname"], c.attrib["name"]) for c in found["forward"]]
    assert places[1] == ("mtp-convert.verify.forward.main", "embedding")
    assert places[-1] == ("mtp-convert.verify.forward.MTP1", "mtp.1.logits")
    assert [s.attrib["failures"] for s in found.values()] == ["0"] * 4


def test_failures_carry_the_figures() -> None:
    forward = suites(failing())["forward"]
    failed = {c.attrib["name"]: c.find("failure") for c in forward if c.find("failure") is not None}
    assert failed.keys() == {"forward", "layers.3"}
    assert failed["layers.3"] is not None
    assert failed["layers.3"].attrib["message"] == "layers.3: relative error 0.213, threshold 1.8e-06"
    (output,) = [c.findtext("system-out", "") for c in forward if c.attrib["name"] == "layers.4"]
    assert "relative 6.5e-07\nthreshold 2.9e-06" in output


def test_every_problem_of_a_level() -> None:
    section = Section("names", 9, tuple(Problem(f"tensor {i}", "a.safetensors", "1", "2") for i in range(3)))
    (failure,) = suites(replace(passing(), sections=(section,)))["names"].iter("failure")
    assert failure.attrib["message"] == "tensor 0 in a.safetensors: got 1, expected 2 (and 2 more)"
    assert (failure.text or "").splitlines()[2] == "tensor 2 in a.safetensors: got 1, expected 2"


def test_not_a_number_fails() -> None:
    failed = {c.attrib["name"] for c in suites(broken())["forward"] if c.find("failure") is not None}
    assert failed == {"forward", "layers.3", "layers.19", "layers.20"}


def test_skipped() -> None:
    for suite in suites(skipped()).values():
        (case,) = suite
        assert [e.get("message") for e in case.iter("skipped")] == ["the families differ"]


def test_hostile_text_is_text() -> None:
    visible = HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    (failure,) = suites(hostile())["names"].iter("failure")
    assert failure.attrib["message"] == f"{visible} in {visible}: got {visible}, expected {visible}"
