"""The one way from a checkpoint to another: prepare a job (arithmetic only), then write it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from mtp_convert import provenance, sidecar
from mtp_convert.before import travelling
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import StoredTensor
from mtp_convert.copies import Settled, settled, with_own
from mtp_convert.depths import folding
from mtp_convert.encodings.dtype import BY_NAME, CAST_TARGETS, FLOATS, DType
from mtp_convert.engine.runner import Progress, Written, write_files
from mtp_convert.engine.sinks import Output, OutTensor, safetensors_output
from mtp_convert.engine.stage import staged
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import PROVENANCE
from mtp_convert.mapping.family import with_depths
from mtp_convert.mapping.layout import Layout
from mtp_convert.mapping.plan import Plan, make_plan
from mtp_convert.megatron_target import megatron_target, megatron_words
from mtp_convert.options import Options
from mtp_convert.parts import part_of
from mtp_convert.readable import Readable
from mtp_convert.recoding import Recoding, recoding
from mtp_convert.shifts import dtype_after, known
from mtp_convert.tied import check_tied


@dataclass(frozen=True)
class Job:
    """A conversion that is ready to run: every file and byte is known, nothing has been written.

    small: files that are written after the payload, in order, by path below the output folder.
    """

    source: Checkpoint
    options: Options
    plan: Plan
    tensors: tuple[OutTensor, ...]
    output: Output
    small: Mapping[str, sidecar.Content]
    recoding: Recoding
    physical: int
    steps: int
    repeated: bool
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all payload files."""
        return self.output.nbytes

    @property
    def reads(self) -> Iterator[StoredTensor]:
        """The stored tensors that the payload is made of."""
        stored = self.source.stored
        names = {name for step in self.plan.steps for name in step.sources}
        yield from (stored.tensors[name] for name in sorted(names))
        yield from (stored.raw[name] for name, weight in stored.beside.items() if weight in names)


@dataclass(frozen=True)
class Result(Readable):
    """What a conversion did."""

    target: Path
    layout: str
    tensors: int
    nbytes: int
    seconds: float
    physical: int
    steps: int
    repeated: bool
    notes: tuple[str, ...] = ()
    files: tuple[Written, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        return {"schema_version": 1, **self.__dict__, "files": [f.path for f in self.files]}


def prepare(source: Checkpoint, options: Options, *, compare: bool = True) -> Job:
    """Plan a conversion; reads at most the tensors that must be equal (copies, folded depths).

    Args:
        compare: False leaves copies and tied params unread, and says so.

    Raises:
        ConvertError: exit code 4 when the source cannot be expressed in the target.
    """
    copied = settled(source, options.copies, options.to) if compare else Settled(source, _uncompared(source))
    source, family = copied.source, source.family
    physical = source.dims.depths if options.depths is None else options.depths
    steps, repeated = _steps(source, options, physical)
    _supported(source, options, physical)
    dims = with_depths(source.dims, physical)
    alias, folded = folding(source, physical, options.force_fold)
    goal = None
    if options.to == "megatron":
        goal = megatron_target(source, options, steps=steps, repeated=repeated)
    target = part_of(family.layout(options.to, dims, _words(source, options)), options.part)
    if compare:
        check_tied(source, target, alias)
    padded = goal.padded(target) if goal else {}
    copies = goal.copies(target) if goal else provenance.copies(source, target)
    plan = make_plan(source.layout, target, alias=alias, copies=copies, padded=padded)
    plan = with_own(plan, source, copied.own)
    shifted = provenance.shifted(source, target.name) if compare else {}
    dtypes = zip(plan.steps, _dtypes(source, plan, options), strict=True)
    tensors = [OutTensor(step, dtype, known(source, step, dtype, shifted)) for step, dtype in dtypes]
    recoded = recoding(source, plan, options)
    if goal:
        args = goal.arguments(max(padded.values(), default=0))
        output = goal.output(tensors, target, args)
        common = sidecar.common_state(args, goal.content(target))
        small = sidecar.megatron_small(source, options, physical, common, recoded.said)
    else:
        output = _safetensors_output(source, options, tensors, recoded)
        small = sidecar.safetensors_small(source, options, physical, recoded.said)
    kept, kept_small = travelling(source, options.to, options.max_shard_size)
    output = replace(output, files=(*output.files, *kept))
    notes = source.notes + copied.notes + folded + _unpadded(source, target) + recoded.notes
    notes += goal.notes if goal else ()
    small = {**small, **kept_small, **output.small}
    return Job(source, options, plan, tuple(tensors), output, small, recoded, physical, steps, repeated, notes)


def _uncompared(source: Checkpoint) -> tuple[str, ...]:
    if not source.copies:
        return ()
    return (f"{len(source.copies)} stored copies were not compared with their main tensors: headers were read only",)


def _words(source: Checkpoint, options: Options) -> dict[str, str]:
    """The spelling of the target: a named variant, else what the weights had there before, else the released one.

    Raises:
        ConvertError: MTP001 for a variant that the family does not have.
    """
    if options.to not in source.family.choices:
        raise ConvertError("MTP028", Problem(f"{source.family.name} has no {options.to} layout"))
    if not options.variant:
        if options.to == "megatron":
            return megatron_words(source, options)
        nested = source.family.nested if source.section and options.to == "hf" else {}
        return {**nested, **provenance.words(source, options.to), **options.words}
    variants = source.family.variants.get(options.to, {})
    if options.variant not in variants:
        expected = ", ".join(variants) or f"none, {source.family.name} has one {options.to} form"
        raise ConvertError("MTP001", Problem("--variant", got=options.variant, expected=expected))
    return {**variants[options.variant], **options.words}


def _safetensors_output(
    source: Checkpoint, options: Options, tensors: Sequence[OutTensor], recoded: Recoding
) -> Output:
    """The shards that the weights had in this layout, if they still fit; else new ones."""
    headers, index = sidecar.shard_headers(source, options.to) if options.restore_shards else ({}, None)
    if source.stored.container == "safetensors":  # new shards keep the order of the old ones
        order = {name: i for i, name in enumerate(source.stored.tensors)}
        tensors = sorted(tensors, key=lambda t: min(order[n] for n in t.step.sources))
    limit = options.max_shard_size
    out = [raw for t in tensors for raw in recoded.out(t, source.stored.tensors)]
    return safetensors_output(out, source.stored.tensors, max_shard_size=limit, headers=headers, index=index)


def run(job: Job, target: Path, *, progress: Progress | None = None) -> Result:
    """Write the output folder: absent or complete, never half.

    Raises:
        ConvertError: exit code 6 for the disk, 73 and 75 for the place.
    """
    begin = monotonic()
    located = job.source.located
    _apart(located.root if located.pinned else located.given, target)
    before = _fingerprint(job.source)
    with staged(target, force=job.options.force, needed=int(job.nbytes * 1.02)) as stage:
        files = write_files(job.output.files, stage, threads=job.options.threads, progress=progress)
        for relative, content in job.small.items():
            path = stage / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content())
        (stage / PROVENANCE).write_text(provenance.record(job, files), encoding="utf-8")
        if _fingerprint(job.source) != before:
            raise ConvertError(
                "MTP041",
                Problem("a file changed while it was read", str(job.source.located.weights)),
            )
    return Result(
        target,
        job.options.to,
        len(job.plan.steps),
        job.nbytes,
        monotonic() - begin,
        job.physical,
        job.steps,
        job.repeated,
        job.notes,
        files,
    )


def _steps(source: Checkpoint, options: Options, physical: int) -> tuple[int, bool]:
    """MTP depths that run in Megatron, and whether one stored depth is run several times."""
    if options.steps is None:
        same = physical == source.dims.depths
        steps = source.steps if same or physical == 1 else physical
        repeated = physical == 1 and steps > 1
        return steps, repeated
    if options.steps != physical and physical != 1:
        raise ConvertError(
            "MTP001",
            Problem(
                "--mtp-num-layers",
                got=str(options.steps),
                expected=f"{physical}, the stored depths",
            ),
            hint="only one stored depth can be run several times; `mtp-convert fold` makes one of equal depths",
        )
    return options.steps, options.steps > physical


def _supported(source: Checkpoint, options: Options, physical: int) -> None:
    """Refuse a Megatron release that cannot hold the model."""
    since = source.family.megatron_since
    if options.to == "megatron" and physical and options.version < since:
        raise ConvertError(
            "MTP028",
            Problem(
                f"Megatron-Core {options.megatron_version} has no MTP in this model class",
                expected=f"{since[0]}.{since[1]} or later",
            ),
            hint="choose a later --megatron-version",
        )


def _unpadded(source: Checkpoint, target: Layout) -> tuple[str, ...]:
    notes = []
    for b in source.layout.bindings.values():
        extra = source.tensor(b.tensor).shape[0] - b.shape[0] if b.vocab else 0
        if extra:
            notes.append(f"{b.tensor}: {extra} padding rows beyond vocab_size {b.shape[0]} are not carried over")
    return tuple(notes)


def _dtypes(source: Checkpoint, plan: Plan, options: Options) -> list[DType]:
    """The element type of every target tensor.

    Raises:
        ConvertError: MTP028 when one target tensor is made of tensors of several types.
    """
    if options.dtype not in ("auto", *CAST_TARGETS):
        known = ", ".join(CAST_TARGETS)
        raise ConvertError("MTP001", Problem("dtype", got=options.dtype, expected=f"auto, {known}"))
    before = provenance.dtypes(source, plan.target.name)
    found, problems = [], []
    for step in plan.steps:
        types = {source.tensor(n).dtype for n in step.sources}
        own = step.binding.dtype or ("" if step.binding.high_precision else options.dtype)
        to = CAST_TARGETS.get(own) or BY_NAME.get(step.binding.dtype or before.get(step.tensor, ""))
        if all(t.name in FLOATS for t in types) and (to is not None or step.shift):
            found.append(to or dtype_after(types))
            continue
        if len(types) > 1:
            problems.append(Problem(f"{step.tensor} would mix {', '.join(sorted(map(str, types)))}"))
        found.append(next(iter(types)))
    if problems:
        raise ConvertError("MTP028", problems, hint="choose one type with --dtype")
    return found


def _apart(source: Path, target: Path) -> None:
    """Output and input must not contain each other."""
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConvertError(
            "MTP001",
            Problem("SRC and DST overlap", str(target)),
            hint="choose a folder outside of SRC",
        )


def _fingerprint(source: Checkpoint) -> list[tuple[int, int]]:
    """What a change of a local file would change; files elsewhere are pinned."""
    stats = (p.stat() for p in source.stored.files if isinstance(p, Path))
    return [(s.st_size, s.st_mtime_ns) for s in stats]
