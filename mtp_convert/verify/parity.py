"""The forward level: conditions chosen, both sides judged, the first wrong place named with what feeds it."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.difference import CheckpointDifference, explain_difference
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.progress import Phases
from mtp_convert.verify import baselines
from mtp_convert.verify.announced import Announced
from mtp_convert.verify.inputs import token_ids
from mtp_convert.verify.judge import Conditions, Verdict, judge, judge_some, sample
from mtp_convert.verify.options import VerifyOptions
from mtp_convert.verify.result import Culprit, PlaceError, Section, Verification
from mtp_convert.verify.side import Side, open_side

NOT_STORED = (
    "by the converter's tables both sides store the same values here, and they compute something else with them: a "
    "table maps them wrongly, or the two configs say different things"
)
CGROUP = Path("/sys/fs/cgroup/memory.max")
SHARE = 0.4  # of the free memory that the weights of one whole model may take


def with_forward(
    found: Verification,
    a: Checkpoint,
    b: Checkpoint,
    options: VerifyOptions,
    difference: CheckpointDifference | None,
    phases: Phases,
) -> Verification:
    """`found` with the forward level.

    Raises:
        ConvertError: MTP032 a model that cannot be run, MTP001 a device that is not there.
    """
    backends = [options.backend if c.layout.name == "megatron" else "" for c in (a, b)]
    opened = (open_side(c, backend=backend) for c, backend in zip((a, b), backends, strict=True))
    first, second = (Announced(side, name, phases) for side, name in zip(opened, "AB", strict=True))
    where = conditions(max(a.stored.nbytes, b.stored.nbytes), options)
    ids = token_ids(options.rows, options.length, vocabulary(a), seed=options.seed, side=a.located.side)
    verdict = _judged(first, second, ids.to(where.device), where, options)
    verdict = replace(verdict, places=baselines.apply(verdict.places, options.tolerances, first.places()))
    bad = [p for p in verdict.places if not p.ok]
    section = Section("forward", len(verdict.places), tuple(map(_problem, bad)))
    culprit = None
    if bad:
        place = bad[0].place
        culprit = blame(place, first.tensors(place), second.tensors(place), a, b, difference)
    return replace(
        found,
        a=first.facts,
        b=second.facts,
        sections=(*found.sections, section),
        places=verdict.places,
        scores=verdict.scores,
        culprit=culprit,
        mode="streamed" if where.streamed else "whole",
        quick=options.quick,
        dtype=options.dtype,
        device=_device_name(where.device),
        tokens=(options.rows, options.length),
    )


def vocabulary(c: Checkpoint) -> int:
    """True rows of the embedding."""
    return min(b.shape[0] for b in c.layout.bindings.values() if b.vocab)


def conditions(stored: int, options: VerifyOptions) -> Conditions:
    """Where and how a model of `stored` bytes runs: on a GPU when there is one, streamed when it would not fit."""
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConvertError("MTP001", Problem("--device", got=name, expected=f"a device that works: {error}")) from error
    dtype: torch.dtype = getattr(torch, options.dtype)
    # Weights of 16 bits become `dtype`, and the floor needs them in twice that.
    needed = stored * dtype.itemsize
    streamed = needed > SHARE * _free_memory(device) if options.mode == "auto" else options.mode == "streamed"
    return Conditions(dtype, device, streamed)


def _free_memory(device: torch.device) -> int:
    """Bytes that a model may count on."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    group = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    limits += [int(group)] if group.isdecimal() else []
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def _judged(a: Side, b: Side, ids: Tensor, where: Conditions, options: VerifyOptions) -> Verdict:
    try:
        if options.quick:
            return judge_some(a, b, ids, where, sample(a), options.seed)
        return judge(a, b, ids, where)
    except ValueError as error:
        raise ConvertError("MTP032", Problem(str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        hint = "fewer --rows or a shorter --length" if where.streamed else "--mode streamed holds one layer at a time"
        raise ConvertError("MTP032", Problem(f"not enough memory on {where.device}"), hint=hint) from error


def _problem(p: PlaceError) -> Problem:
    return Problem("relative error", p.place, got=f"{p.relative:.1e}", expected=f"at most {p.threshold:.1e}")


def blame(
    place: str,
    mine: tuple[str, ...],
    theirs: tuple[str, ...],
    a: Checkpoint,
    b: Checkpoint,
    difference: CheckpointDifference | None,
) -> Culprit:
    """What feeds a place on both sides, which of it differs, and what may have happened to it."""
    if difference is None:
        return Culprit(place, mine, theirs)
    suspects = [d.param for d in difference.differing if d.a in mine or d.b in theirs]
    if not suspects:
        return Culprit(place, mine, theirs, guess=NOT_STORED)
    explained = explain_difference(a, b, suspects)
    guess = "; ".join(dict.fromkeys(d.guess for d in explained if d.guess))
    return Culprit(place, mine, theirs, tuple(suspects), guess)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
