"""A verification as JUnit XML, as CI servers read it (the junit-10 schema of Jenkins' xUnit plugin).

One suite per level. Each has a case for the level as a whole; `forward` also has one for every place, with its
figures as output.
"""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from mtp_convert.errors import Problem
from mtp_convert.summary import printable
from mtp_convert.verify.result import PlaceError, Section, Verification
from mtp_convert.verify.wording import counted, number, step_name

NAME = "mtp-convert.verify"


def junit_xml(v: Verification) -> str:
    """The XML document; without times of single cases, because places are not timed."""
    root = Element("testsuites", name=NAME)
    for section in v.sections:
        root.append(_suite(section, v.places if section.level == "forward" else ()))
    suites = list(root)
    for word in ("tests", "failures"):
        root.set(word, str(sum(int(suite.get(word, "0")) for suite in suites)))
    root.set("errors", "0")
    root.set("time", f"{v.seconds:.3f}")
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _suite(section: Section, places: Iterable[PlaceError]) -> Element:
    cases = [_level(section), *map(_place, places)]
    suite = Element("testsuite", name=f"{NAME}.{section.level}", tests=str(len(cases)), errors="0")
    for word, child in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(word, str(sum(case.find(child) is not None for case in cases)))
    suite.extend(cases)
    return suite


def _level(section: Section) -> Element:
    """The level as a whole: skipped, failed with every problem, or passed."""
    case = _case(section.level, section.level)
    if section.problems:
        lines = [_line(p) for p in section.problems]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        _failure(case, lines[0] + more, lines)
    elif section.skipped:
        SubElement(case, "skipped", message=printable(section.skipped))
    notes = [printable(n) for n in section.notes]
    SubElement(case, "system-out").text = "\n".join([f"{counted(section.compared, 'thing')} compared", *notes])
    return case


def _place(p: PlaceError) -> Element:
    case = _case(f"forward.{step_name(p.place).replace(' ', '')}", p.place)
    if not p.ok:
        message = f"{p.place}: relative error {number(p.relative)}, threshold {number(p.threshold)}"
        _failure(case, printable(message), [printable(message)])
    names = ("relative", "threshold", "floor", "max_abs", "mean_abs", "chained")
    figures = [f"{name} {number(getattr(p, name))}" for name in names]
    SubElement(case, "system-out").text = "\n".join([*figures, f"1 - cosine {number(1 - p.cosine)}"])
    return case


def _case(group: str, name: str) -> Element:
    return Element("testcase", classname=printable(f"{NAME}.{group}"), name=printable(name))


def _failure(case: Element, message: str, lines: Iterable[str]) -> None:
    SubElement(case, "failure", type="mismatch", message=message).text = "\n".join(lines)


def _line(problem: Problem) -> str:
    return printable(problem.line())
