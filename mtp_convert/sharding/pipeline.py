"""How a model is cut into pipeline stages: decoder layers, and what else each chunk of the model holds.

Chunks are in the order of the model. Rules of Megatron-Core: MTP lies on one chunk, the last one unless a layout puts
it elsewhere, with a copy of the embedding; the output layer is on the last chunk; the final norm of a hybrid model too,
that of a GPT model with MTP behind its last decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.sharding.sizes import Sizes

LETTERS = {"E": "embedding", "t": "layer", "m": "mtp", "L": "head"}
MOST = 1 << 16  # letters of a layout
UNEVEN = "give the layers of the first or last stage, or any division with --pipeline-model-parallel-layout"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the model: its decoder layers (global numbers), and which of the other parts it holds."""

    layers: range
    embedding: bool = False
    final_norm: bool = False
    mtp: bool = False
    head: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """What is asked for besides the sizes: a layout string, or the decoder layers of the first and last stage."""

    layout: str = ""
    first: int | None = None
    last: int | None = None


def chunks(args: Mapping[str, Any], sizes: Sizes, split: Split) -> tuple[Chunk, ...]:
    """The chunks of the model that training arguments describe.

    Raises:
        ConvertError: MTP001 when the layers cannot be divided so.
    """
    layers, depths = int(args["num_layers"]), int(args.get("mtp_num_layers") or 0)
    hybrid = bool(args.get("hybrid_layer_pattern"))
    if split.layout:
        if split.first is not None or split.last is not None:
            raise _refused("a layout and the layers of single stages", split.layout, "one of them")
        rows = parse_layout(split.layout)
        _check_layout(rows, layers, depths, sizes, hybrid=hybrid)
        counts = [row.count("layer") for row in rows]
        mtp = next((i for i, row in enumerate(rows) if "mtp" in row), len(rows) - 1)
    else:
        counts = _counts(layers, sizes, split)
        mtp = len(counts) - 1
    starts = [0, *accumulate(counts)]
    found = [Chunk(range(start, start + n)) for start, n in zip(starts, counts, strict=False)]
    last = len(found) - 1
    norm = last if hybrid or not depths else max(i for i, n in enumerate(counts) if n)
    return tuple(
        replace(
            c,
            embedding=i == 0 or (i == mtp and depths > 0),
            final_norm=i == norm,
            mtp=i == mtp and depths > 0,
            head=i == last,
        )
        for i, c in enumerate(found)
    )


def pattern_of(args: Mapping[str, Any], found: tuple[Chunk, ...], sizes: Sizes) -> str:
    """A hybrid model's layer pattern, with `|` between chunks where Megatron-Core would not cut it so by itself."""
    main, *mtp = str(args["hybrid_layer_pattern"]).split("/")
    even = len({len(c.layers) for c in found}) == 1
    if sizes.chunks > 1 and (sizes.virtual > 1 or not even):
        main = "|".join(main[c.layers.start : c.layers.stop] for c in found)
    return "/".join([main, *mtp])


def _counts(layers: int, sizes: Sizes, split: Split) -> list[int]:
    """Decoder layers per chunk without a layout: every stage has as many in each of its chunks."""
    fixed = ((0, split.first), (sizes.pipeline - 1, split.last))
    given = {stage: n for stage, n in fixed if n is not None}
    if given and sizes.pipeline == 1:
        raise _refused("layers of single stages", str(split), "more than one pipeline stage")
    middle, rest = sizes.pipeline - len(given), layers - sum(given.values())
    if rest < 0 or (rest and not middle) or (middle and rest % middle) or (middle and not rest and given):
        text = f" beyond those set, {list(given.values())}" if given else ""
        raise _refused(
            f"pipeline parallel size {sizes.pipeline} does not divide num_layers{text}", str(layers), hint=UNEVEN
        )
    per_stage = [given.get(stage, rest // middle if middle else 0) for stage in range(sizes.pipeline)]
    if any(n % sizes.virtual for n in per_stage):
        raise _refused(f"{sizes.virtual} virtual stages do not divide the layers of a stage", str(per_stage))
    return [n // sizes.virtual for n in per_stage] * sizes.virtual


def parse_layout(text: str) -> list[list[str]]:
    """Megatron's layout string as one list of parts per chunk: E embedding, t decoder layer, m MTP depth, L head,
    `|` between chunks, `*n` after a letter or after `( )` repeats it.

    Raises:
        ConvertError: MTP001.
    """
    letters = _unroll(text.replace(",", "").replace(" ", ""))
    if unknown := sorted(set(letters) - LETTERS.keys() - {"|"}):
        raise _refused("pipeline layout", ", ".join(map(repr, unknown)), "E, t, m, L, |, ( ) and *n")
    return [[LETTERS[letter] for letter in row] for row in letters.split("|")]


def _unroll(text: str) -> str:
    """The text without repetitions; groups do not nest."""
    out = ""
    for group, count in _groups(text):
        group = _unroll(group) if len(group) > 1 else group
        if len(out) + len(group) * count > MOST:
            raise _refused("pipeline layout", text[:60], f"at most {MOST} parts")
        out += group * count
    return out


def _groups(text: str) -> Iterator[tuple[str, int]]:
    """Letters and bracketed groups with how often each comes."""
    at = 0
    while at < len(text):
        end = text.find(")", at) if text[at] == "(" else at
        if end < 0:
            raise _refused("pipeline layout", text[at:], "a closing bracket")
        bracket = text[at] == "("
        group = text[at + 1 : end] if bracket else text[at]
        if "(" in group or group in ("", ")", "*"):
            raise _refused("pipeline layout", text[at : end + 1], "a letter, or a group of letters")
        at, count = end + 1, 1
        if bracket or text[at : at + 1] == "*":
            stop = at + 1
            while text[stop : stop + 1].isdecimal():
                stop += 1
            if not 1 <= stop - at - 1 <= 5:
                raise _refused("pipeline layout", text[at:], "a number behind *")
            at, count = stop, int(text[at + 1 : stop])
        yield group, count


def _check_layout(rows: list[list[str]], layers: int, depths: int, sizes: Sizes, *, hybrid: bool) -> None:
    """Every condition that Megatron-Core puts on a layout."""
    flat = [part for row in rows for part in row]
    with_mtp = [row for row in rows if "mtp" in row]
    wrong = [
        (len(rows) != sizes.chunks, f"{len(rows)} chunks", f"{sizes.chunks}, pipeline size times virtual stages"),
        (flat.count("layer") != layers, f"{flat.count('layer')} decoder layers (t)", str(layers)),
        (flat.count("mtp") != depths, f"{flat.count('mtp')} MTP depths (m)", str(depths)),
        (len(with_mtp) > 1, f"MTP depths on {len(with_mtp)} chunks", "all on one"),
        (flat[:1] != ["embedding"] or flat.count("embedding") != 1, "E elsewhere", "one E, at the front"),
        (flat[-1:] != ["head"] or flat.count("head") != 1, "L elsewhere", "one L, at the end"),
        ("mtp" in flat and "layer" in flat[flat.index("mtp") :], "t behind m", "decoder layers before MTP depths"),
        (any("mtp" in r for r in rows[: -sizes.pipeline]), "m before the last round", "m in the last virtual stages"),
        (hybrid and bool(with_mtp) and "mtp" not in rows[-1], "m on its own", "m with L in a hybrid model"),
    ]
    problems = [Problem("pipeline layout", got=got, expected=expected) for bad, got, expected in wrong if bad]
    if problems:
        raise ConvertError("MTP001", problems)


def _refused(what: str, got: str, expected: str = "", hint: str = "") -> ConvertError:
    return ConvertError("MTP001", Problem(what, got=got, expected=expected), hint=hint)
