"""The model card of a converted checkpoint, written from what is recorded and measured, and from nothing else.

Licence and metadata come from the card of the source. Its text travels as a file of its own: what its authors measured
was measured on their checkpoint, so no figure of theirs stands in this card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub
from huggingface_hub import ModelCardData

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub import usage
from mtp_convert.hub.verified import Verified
from mtp_convert.location import CARRIED, PICTURES, PROVENANCE
from mtp_convert.summary import printable, size_text
from mtp_convert.verify import wording
from mtp_convert.verify.pictures import depth_bars_svg, error_plot_svg
from mtp_convert.verify.result import LogitScores, SideFacts, Verification

CARD = "README.md"
SOURCE_CARD = "README.source.md"
ERRORS_SVG, DEPTHS_SVG = PICTURES
OURS = "<!-- written by mtp-convert push -->"
TAGS = ("multi-token-prediction", "mtp", "mtp-convert")
# What a licence, a gate or a search needs. Results, widgets and carbon figures are the source's own.
CARRIED_FIELDS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "library_name",
    "base_model",
    "base_model_relation",
    "datasets",
    "extra_gated_heading",
    "extra_gated_description",
    "extra_gated_prompt",
    "extra_gated_fields",
    "extra_gated_button_content",
)
LARGEST = 4 << 20  # bytes of a card


@dataclass(frozen=True)
class Written:
    """Files of the card by path, and what the user should know about it."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


def write_card(c: Checkpoint, record: Mapping[str, Any], verified: Verified, repo: str) -> Written:
    """README.md, the pictures of the last verification, and the source's own card under another name.

    Raises:
        ConvertError: MTP060 when the source's card begins with metadata that is no YAML.
    """
    path, text = _source_card(c)
    meta, body = split_card(text, str(path or CARD))
    notes = () if "license" in meta else ("the card of the source names no license, so neither does this one",)
    files, aside = {}, ""
    if body.strip() and OURS not in text:
        aside = f"{CARRIED}/{CARD}" if c.located.side != c.located.root else SOURCE_CARD
        if aside == SOURCE_CARD:
            files[SOURCE_CARD] = text.encode()
    if verified.result is not None:
        files |= pictures(verified.result)
    sections = [
        _head(c, record, repo),
        _origin(c, record, aside),
        _inside(c, record),
        _depths(c),
        _parity(verified.result, files),
        usage.run_it(c, repo),
        usage.go_back(record, repo),
    ]
    front = metadata(meta, c).to_yaml()
    files[CARD] = f"---\n{front}\n---\n{OURS}\n\n{chr(10).join(sections)}".encode()
    return Written(files, notes)


def pictures(v: Verification) -> dict[str, bytes]:
    """The pictures that the figures give, by file name."""
    found = {}
    if v.places:
        found[ERRORS_SVG] = error_plot_svg(v).encode()
    if v.scores:
        found[DEPTHS_SVG] = depth_bars_svg(v).encode()
    return found


def _source_card(c: Checkpoint) -> tuple[Path | None, str]:
    path = c.located.side / CARD
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None, ""
    return path, path.read_text(encoding="utf-8", errors="replace")


def split_card(text: str, name: str) -> tuple[dict[str, Any], str]:
    """The metadata block of a card, empty where there is none, and the rest.

    Raises:
        ConvertError: MTP060.
    """
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    if not lines or lines[0].rstrip() != "---":
        return {}, text
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    try:
        found = yaml.safe_load("".join(lines[1:end])) if end else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConvertError("MTP060", Problem(" ".join(str(error).split()), name)) from error
    if end is None or not isinstance(found, dict | None):
        raise ConvertError("MTP060", Problem("no metadata", name, expected="`name: value` lines between two ---"))
    return {str(k): v for k, v in (found or {}).items()}, "".join(lines[end + 1 :])


def metadata(source: Mapping[str, Any], c: Checkpoint) -> ModelCardData:
    """The head of the card: what the source says of itself that stays true, and what this checkpoint is."""
    kept = {name: source[name] for name in CARRIED_FIELDS if name in source}
    if c.layout.name == CARRIED:
        kept.setdefault("library_name", "transformers")
    else:
        kept.pop("library_name", None)
    theirs = source.get("tags")
    tags = [str(t) for t in theirs] if isinstance(theirs, list) else [str(theirs)] if theirs else []
    return ModelCardData(**kept, tags=list(dict.fromkeys([*tags, *TAGS])))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells are text, whatever they hold."""
    lines = [[*head], ["---"] * len(head), *([cell(x) for x in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object) -> str:
    """Text of a file in a table: no control characters, no column, no markup of its own."""
    text = printable(str(value))
    for char in "\\`*_[]<>|":
        text = text.replace(char, f"\\{char}")
    return text


def code(text: str) -> str:
    """Text in backquotes, which none of its own can end."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '&#124;')}`"


def _head(c: Checkpoint, record: Mapping[str, Any], repo: str) -> str:
    depths = wording.counted(c.dims.depths, "Multi-Token Prediction depth") if c.dims.depths else "no MTP heads"
    part = record.get("target", {}).get("part")
    what = "The Multi-Token Prediction heads alone" if part else "A checkpoint"
    return (
        f"# {printable(repo.rpartition('/')[2])}\n\n"
        f"{what} of the family {c.family.title}, with {depths}, in the layout `{c.layout.name}`. "
        "Converted, not trained.\n"
    )


def _origin(c: Checkpoint, record: Mapping[str, Any], aside: str) -> str:
    source = record.get("source", {})
    rows: list[tuple[str, object]] = [
        ("source", usage.linked(str(source.get("name", "")))),
        ("source layout", cell(f"{source.get('layout')} in {source.get('container')}")),
        ("source types", cell(_joined(source.get("dtypes", ())))),
        ("command", code(usage.command(record))),
        ("tool", cell(f"mtp-convert {record.get('version')}")),
        ("origin of every tensor", code(str(record.get("provenance_digest", "")))),
    ]
    left = source.get("left_behind") or []
    if left:
        rows.append(("left behind", cell(f"{len(left)} entries, listed in {PROVENANCE}")))
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows)
    own = f"\nThe [card of the source]({aside}) is its authors'; nothing in it was measured here.\n" if aside else ""
    return f"## Where it comes from\n\n| | |\n|---|---|\n{lines}{own}"


def _joined(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def _inside(c: Checkpoint, record: Mapping[str, Any]) -> str:
    target = record.get("target", {})
    types: dict[str, int] = {}
    for t in c.stored.in_files.values():
        types[t.dtype.name] = types.get(t.dtype.name, 0) + 1
    rows: list[tuple[str, object]] = [
        ("layout", f"{c.layout.name} in {c.stored.container}"),
        ("tensors", f"{len(c.stored.in_files)}, {size_text(c.stored.nbytes)} in {len(c.stored.files)} files"),
        ("types", ", ".join(f"{n} x {d}" for d, n in types.items())),
    ]
    if target.get("encodings"):
        rows.append(("encodings", ", ".join(f"{n} x {d}" for d, n in target["encodings"].items())))
    if target.get("megatron_version"):
        rows.append(("written for", f"Megatron-Core {target['megatron_version']}"))
    if c.stored.parallel:
        rows.append(("ranks", ", ".join(f"{name} {n}" for name, n in c.stored.parallel.items())))
    if c.copies:
        rows.append(("copies that are stored", ", ".join(sorted(c.copies))))
    notes = [f"\n- {cell(note)}" for note in (*c.family.notes, *map(str, record.get("notes", ())))]
    return f"## What is inside\n\n{table(['', ''], rows)}{''.join(notes)}\n"


def _depths(c: Checkpoint) -> str:
    rows = []
    for k in range(c.dims.depths):
        names = c.family.depth_tensors(c.layout, c.dims, k) & c.stored.tensors.keys()
        nbytes = sum(c.tensor(n).nbytes for n in names)
        runs = f"{c.steps} times (repeated layer)" if c.repeated else "once"
        rows.append((k, len(names), size_text(nbytes), runs))
    if not rows:
        return "## MTP heads\n\nNone.\n"
    text = "Draft tokens ahead of the main model's next token, one per step.\n\n"
    return f"## MTP heads\n\n{text}{table(['stored depth', 'tensors', 'size', 'runs'], rows)}"


def _parity(v: Verification | None, files: Mapping[str, bytes]) -> str:
    head = "## Parity with the source\n\n"
    if v is None:
        return f"{head}Not measured: no result of `mtp-convert verify` came with this checkpoint.\n"
    verdict = wording.verdict(v)
    levels = [(s.level, s.compared, f"{wording.mark(s)}{f': {s.skipped}' if s.skipped else ''}") for s in v.sections]
    parts = [
        f"{head}**{verdict.word}**: {cell(verdict.sentence)}\n",
        f"A = {_side(v.a)}, B = {_side(v.b)}; {cell(wording.run_text(v))}.\n",
        table(["level", "compared", "result"], levels),
    ]
    if v.places:
        worst = [
            (p.place, *map(wording.number, (p.relative, p.floor, p.threshold))) for p in wording.worst_first(v)[:3]
        ]
        parts.append("Places closest to their threshold (relative error of B, given A's input):\n")
        parts.append(table(["place", "error", "rounding alone", "threshold"], worst))
    if v.scores:
        parts.append(table(["logits", "KL A to B (nats)", "top-1 agreement", "loss A / B", "accepted drafts A / B"],
                           [_score_row(s) for s in v.scores]))  # fmt: skip
    for name, words in ((ERRORS_SVG, "Relative error of every place"), (DEPTHS_SVG, "Figures of every MTP step")):
        if name in files:
            parts.append(f"![{words}]({name})\n")
    versions = ", ".join(f"{k} {value}" for k, value in v.environment.items() if k != "command")
    parts.append(f"Measured by {code(wording.command_line(v))} with {cell(versions)}.\n")
    return "\n".join(parts)


def _side(side: SideFacts) -> str:
    return f"{code(side.path)} ({cell(side.layout)}, {cell(side.backend or side.container)})"


def _score_row(s: LogitScores) -> tuple[str, ...]:
    accepted = "" if s.acceptance is None else " / ".join(map(wording.share, s.acceptance))
    losses = " / ".join(map(wording.number, s.loss))
    return s.place, wording.number(s.kl), wording.share(s.top1), losses, accepted
