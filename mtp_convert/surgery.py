"""MTP heads put onto a model or made for one. Taking them off, or out, is a conversion with fewer params.

graft: the heads of one checkpoint on the decoder of another. init: new heads for a model that has none, every one a
copy of its last decoder layer. Both join stored tensors into one checkpoint without touching a byte; a conversion then
writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from mtp_convert import quantization
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import StoredTensor
from mtp_convert.encoded import called
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.live import stored_tensor
from mtp_convert.mapping.family import ConfigError, with_depths
from mtp_convert.mapping.layout import Binding, Layout
from mtp_convert.mapping.rules import Placed
from mtp_convert.parts import of_depths
from mtp_convert.reread import in_files, joined

# What opens an MTP depth has no twin in the decoder.
FUSION_NORMS = ("enorm", "hnorm")
HIDDEN, EMBEDDED = ("eh_proj.h", "h_proj"), ("eh_proj.e", "e_proj")  # starts as identity, as zero


def graft(base: Checkpoint, draft: Checkpoint) -> Checkpoint:
    """The decoder of `base` with the MTP depths of `draft`; neither is copied yet.

    Raises:
        ConvertError: MTP028 unless both are one model in one layout and spelling, MTP026 when the ends that both hold
            differ, MTP022 when `draft` has no depths.
    """
    _same_model(base, draft)
    _same_ends(base, draft)
    heads = {b.tensor for b in draft.layout.bindings.values() if _is_mtp(b)}
    heads |= {n for n in draft.copies if of_depths(draft.layout.copies[n]) or n not in base.layout.bindings}
    mine = {b.tensor for b in base.layout.bindings.values() if _is_mtp(b)}
    _same_quantization(base, draft, heads)
    kept = base.stored.tensors.keys() - mine
    tensors = in_files(base, kept) | in_files(draft, heads & draft.stored.tensors.keys() - kept)
    theirs = draft.model_config
    fields = (base.family.depths.name, *base.family.depths.others)
    section = {**base.model_config, **{f: theirs[f] for f in fields if f in theirs}}
    depths = base.family.depths.declared(theirs)
    if base.family.depths.declared(section) != depths:  # counted in a section of its own
        section = base.family.depths.corrected(section, depths)
    return joined(base, tensors, section, files=(*base.stored.files, *draft.stored.files))


def init(base: Checkpoint, depths: int) -> Checkpoint:
    """`base` with `depths` new MTP depths: every block has the values of the last decoder layer of its kind.

    The fusion passes the hidden state on and adds nothing of the embedding, so that depth 0 starts as that layer run
    once more; its norms are those in front of that layer.

    Raises:
        ConvertError: MTP028 when the model has depths already, or no layer of the kind that a depth needs.
    """
    if base.dims.depths:
        problem = Problem("MTP depths are there already", got=str(base.dims.depths), expected="0")
        raise ConvertError("MTP028", problem, hint="`mtp-convert drop` removes them")
    family = base.family
    section = family.depths.corrected(base.model_config, depths)
    try:
        dims = with_depths(family.dims(section, depths), depths)
    except ConfigError as error:
        hint = f"say in config.json what a depth is made of: {', '.join(family.depths.others) or family.depths.name}"
        raise ConvertError("MTP020", Problem(str(error), "config.json"), hint=hint) from error
    layout = family.layout(base.layout.name, dims, base.layout.words)
    twins = dict(_twins(list(family.places(dims))))
    made: dict[str, StoredTensor] = {}
    missing = []
    for binding in layout.bindings.values():
        if not _is_mtp(binding):
            continue
        found = _new(binding, twins, base, layout)
        if found is None:
            missing.append(Problem(f"{binding.tensor} has no twin in the decoder"))
        else:
            made |= {t.name: t for t in found}
    if missing:
        raise ConvertError("MTP028", missing, hint="no decoder layer is of the kind that an MTP depth needs")
    return joined(base, {**base.stored.in_files, **made}, section, files=base.stored.files)


def _same_model(base: Checkpoint, draft: Checkpoint) -> None:
    problems = []
    pairs = {
        "family": (base.family.name, draft.family.name),
        "layout": (base.layout.name, draft.layout.name),
        "spelling": (dict(base.layout.words), dict(draft.layout.words)),
    }
    problems += [Problem(what, got=str(b), expected=str(a)) for what, (a, b) in pairs.items() if a != b]
    if base.family.name == draft.family.name:
        shapes = base.layout.params
        wrong = ((n, p) for n, p in draft.layout.params.items() if n in shapes and shapes[n].shape != p.shape)
        problems += [Problem(n, got=str(list(p.shape)), expected=str(list(shapes[n].shape))) for n, p in wrong]
        hidden = _width(base), _width(draft)
        if None not in hidden and hidden[0] != hidden[1]:
            problems.append(Problem("hidden size", got=str(hidden[1]), expected=str(hidden[0])))
    if problems:
        raise ConvertError("MTP028", problems, hint="convert one of them first; both must be the same model")
    if not draft.dims.depths:
        raise ConvertError("MTP022", Problem("no MTP depth", str(draft.located.given)))


def _width(c: Checkpoint) -> int | None:
    """The hidden size: that of a norm at its ends, if it holds one."""
    norms = ("final_norm", *(f"mtp.0.{norm}" for norm in FUSION_NORMS))
    return next((c.layout.params[n].shape[0] for n in norms if n in c.layout.params), None)


def _same_quantization(base: Checkpoint, draft: Checkpoint, heads: set[str]) -> None:
    """One config must describe both.

    Raises:
        ConvertError: MTP028.
    """
    if all(draft.tensor(n).encoding is None for n in heads & draft.stored.tensors.keys()):
        return
    ours, theirs = (quantization.read(c.config, c.section, c.located.side) for c in (base, draft))
    fields = ("method", "fp8", "fp4", "powers")
    pairs = [(f, getattr(ours, f), getattr(theirs, f)) for f in fields]
    if problems := [Problem(f"quantisation: {f}", got=str(b), expected=str(a)) for f, a, b in pairs if a != b]:
        raise ConvertError("MTP028", problems, hint="convert the heads with --encoding bf16 first")


def _same_ends(base: Checkpoint, draft: Checkpoint) -> None:
    """Embedding and head that the heads were trained with, where they travelled along."""
    reader, problems = Reader(), []
    try:
        for binding in draft.layout.bindings.values():
            if _is_mtp(binding) or binding.tensor not in base.layout.bindings:
                continue
            if binding.parts[0].param not in ("embedding", "head"):
                continue
            a, b = base.tensor(binding.tensor), draft.tensor(binding.tensor)
            if (d := compare(StoredExtent(a), StoredExtent(b), reader)) is not None:
                problems.append(Problem(f"{binding.tensor} of the heads is not the base's: {d.text()}"))
    finally:
        reader.close()
    if problems:
        raise ConvertError(
            "MTP026", problems, hint="these heads belong to another base; extract them without their ends"
        )


def _is_mtp(binding: Binding) -> bool:
    return of_depths(binding.parts[0].param)


def _twins(places: list[Placed]) -> Iterator[tuple[str, str]]:
    """(start of MTP params, start of decoder params) for every block of a depth that the decoder has too."""
    decoder = [p for p in places if "i" in p.at]
    for place in (p for p in places if "k" in p.at):
        same = [p for p in decoder if p.block.params == place.block.params]
        if same:
            yield place.param.format_map(dict(place.at)), same[-1].param.format_map(dict(same[-1].at))


def _new(
    binding: Binding, twins: Mapping[str, str], base: Checkpoint, layout: Layout
) -> tuple[StoredTensor, ...] | None:
    """What is stored of the values that a new MTP tensor begins with: the tensor, or codes and scales."""
    params = [part.param for part in binding.parts]
    source = [_origin(p, twins, base) for p in params]
    if all(source):
        homes = {base.layout.home[s][0].tensor for s in source if s}
        if len(homes) == 1 and (own := base.tensor(homes.pop())).shape == binding.shape:
            if own.encoding is None:
                return (replace(own, name=binding.tensor),)
            return tuple(called(t, own.name, binding.tensor) for t in in_files(base, [own.name]).values())
    if all(p.endswith((*HIDDEN, *EMBEDDED)) for p in params):
        return (_passing(binding, base, layout),)
    return None


def _origin(param: str, twins: Mapping[str, str], base: Checkpoint) -> str | None:
    """The param of the base whose values an MTP param begins with."""
    start = max((s for s in twins if param.startswith(s) and s.count(".") > 1), key=len, default=None)
    if start is not None and twins[start] + param.removeprefix(start) in base.layout.home:
        return twins[start] + param.removeprefix(start)
    leaf = param.split(".", 2)[2]
    if leaf == "final_layernorm":
        return "final_norm"
    if leaf in FUSION_NORMS:
        return next(
            (n for n in reversed(list(base.layout.home)) if n.startswith("layers.") and _is_input_norm(n)), None
        )
    return leaf if leaf in base.layout.home else None


def _is_input_norm(param: str) -> bool:
    return param.endswith((".attention.norm", ".norm")) and not param.endswith((".mlp.norm", "pool.norm"))


def _passing(binding: Binding, base: Checkpoint, layout: Layout) -> StoredTensor:
    """A projection that passes the hidden state on: identity for its columns, zero for those of the embedding."""
    dtype = base.tensor(next(iter(base.layout.bindings))).dtype.torch()
    values = torch.zeros(binding.shape, dtype=dtype)
    for part in binding.parts:
        if part.param.endswith(HIDDEN):
            row, column = part.view.start
            n = layout.params[part.param].shape[0]
            values[row : row + n, column : column + n].fill_diagonal_(1)
    return stored_tensor(binding.tensor, values)
