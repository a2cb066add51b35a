"""The one way from a checkpoint to another: prepare a job (arithmetic only), then write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import xxhash

from mtp_convert import __version__, sidecar
from mtp_convert.checkpoint import PROVENANCE, Checkpoint
from mtp_convert.depths import folding
from mtp_convert.encodings.dtype import CAST_TARGETS, FLOATS, DType
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.engine.runner import Progress, Written, write_files
from mtp_convert.engine.sinks import Output, OutTensor, safetensors_output, torch_dist_output
from mtp_convert.engine.stage import staged
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.family import with_depths
from mtp_convert.mapping.layout import Layout
from mtp_convert.mapping.plan import Plan, make_plan
from mtp_convert.options import Options

RELEASE = "release"  # the iteration folder of a converted checkpoint: no optimizer, iteration 0


@dataclass(frozen=True)
class Job:
    """A conversion that is ready to run: every file and byte is known, nothing has been written.

    small: files that are written after the payload, in order, by path below the output folder.
    """

    source: Checkpoint
    options: Options
    plan: Plan
    output: Output
    small: Mapping[str, Callable[[], bytes] | Path]
    physical: int
    steps: int
    repeated: bool
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all payload files."""
        return self.output.nbytes


@dataclass(frozen=True)
class Result:
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


def prepare(source: Checkpoint, options: Options) -> Job:
    """Plan a conversion; reads at most the tensors that must be equal (copies, folded depths).

    Raises:
        ConvertError: exit code 4 when the source cannot be expressed in the target.
    """
    family = source.family
    check_copies(source)
    physical = source.dims.depths if options.depths is None else options.depths
    steps, repeated = _steps(source, options, physical)
    _supported(source, options, physical)
    dims = with_depths(source.dims, physical)
    alias, notes = folding(source, physical, options.force_fold)
    target = family.layout(options.to, dims, {**_words(source, options.to), **options.words})
    plan = make_plan(
        source.layout,
        target,
        alias=alias,
        copies=_copies(source, target),
        padded=_padding(target, options),
    )
    tensors = [OutTensor(s, d) for s, d in zip(plan.steps, _dtypes(source, plan, options), strict=True)]
    notes = source.notes + notes + _unpadded(source, target)
    if options.to == "megatron":
        output = torch_dist_output(
            tensors,
            source.stored.tensors,
            folder=RELEASE,
            objects=target.objects,
            max_file_size=options.max_shard_size,
        )
        small = _megatron_small(source, options, physical, steps, repeated)
    else:
        headers, index = sidecar.carried_headers(source.located.side) if options.restore_shards else ({}, None)
        if source.located.layout == "hf" and options.restore_shards and physical == source.dims.depths:
            headers = dict(source.stored.headers)
        output = safetensors_output(
            tensors, source.stored.tensors, max_shard_size=options.max_shard_size, headers=headers
        )
        output = _original_index(output, index, headers)
        small = _hf_small(source, physical)
    return Job(source, options, plan, output, {**small, **output.small}, physical, steps, repeated, notes)


def run(job: Job, target: Path, *, progress: Progress | None = None) -> Result:
    """Write the output folder: absent or complete, never half.

    Raises:
        ConvertError: exit code 6 for the disk, 73 and 75 for the place.
    """
    begin = monotonic()
    _apart(job.source.located.given, target)
    before = _fingerprint(job.source)
    with staged(target, force=job.options.force, needed=int(job.nbytes * 1.02)) as stage:
        files = write_files(job.output.files, stage, threads=job.options.threads, progress=progress)
        for relative, content in job.small.items():
            path = stage / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read_bytes() if isinstance(content, Path) else content())
        (stage / PROVENANCE).write_text(provenance(job, files), encoding="utf-8")
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


def check_copies(source: Checkpoint) -> None:
    """Stored copies must equal the tensors they copy, byte for byte.

    Raises:
        ConvertError: MTP026, with the size of every difference.
    """
    reader = Reader()
    problems = []
    try:
        for name in sorted(source.copies):
            own = source.tensor(source.layout.home[source.layout.copies[name]][0].tensor)
            if (d := compare(StoredExtent(source.tensor(name)), StoredExtent(own), reader)) is not None:
                problems.append(Problem(f"{name} is not the copy of {own.name} that the config says: {d.text()}"))
    finally:
        reader.close()
    if problems:
        raise ConvertError(
            "MTP026",
            problems,
            hint="if the model has its own output head, set tie_word_embeddings to false",
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


def _remembered(source: Checkpoint, layout: str) -> Mapping[str, Any]:
    """What an earlier conversion noted about the form that the weights had in `layout` (nothing if they never had)."""
    layouts = source.provenance.get("layouts")
    found = layouts.get(layout) if isinstance(layouts, dict) else None
    return found if isinstance(found, dict) else {}


def _words(source: Checkpoint, layout: str) -> Mapping[str, str]:
    """The spelling of the target: the source's, or the one the weights had before; else the released one."""
    if source.located.layout == layout:
        return source.layout.words
    words = _remembered(source, layout).get("words")
    known = source.family.choices[layout]
    return {w: s for w, s in words.items() if s in known.get(w, ())} if isinstance(words, dict) else {}


def _copies(source: Checkpoint, target: Layout) -> frozenset[str]:
    """Copies are written iff the weights had them in this layout."""
    if source.located.layout == target.name:
        return source.copies & target.copies.keys()
    copies = _remembered(source, target.name).get("copies")
    return frozenset(c for c in copies if c in target.copies) if isinstance(copies, list) else frozenset()


def _padding(target: Layout, options: Options) -> dict[str, int]:
    """Rows of vocabulary tensors in a Megatron target."""
    multiple = options.padding * (options.parallel.get("tensor", 1) if options.padding > 1 else 1)
    if options.to != "megatron" or multiple == 1:
        return {}
    return {n: -(-b.shape[0] // multiple) * multiple for n, b in target.bindings.items() if b.vocab}


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
    cast = CAST_TARGETS.get(options.dtype)
    found, problems = [], []
    for step in plan.steps:
        types = {source.tensor(n).dtype for n in step.sources}
        if cast and not step.binding.high_precision and all(t.name in FLOATS for t in types):
            found.append(cast)
            continue
        if len(types) > 1:
            problems.append(Problem(f"{step.tensor} would mix {', '.join(sorted(map(str, types)))}"))
        found.append(next(iter(types)))
    if problems:
        raise ConvertError("MTP028", problems, hint="choose one type with --dtype")
    return found


def _megatron_small(
    source: Checkpoint, options: Options, physical: int, steps: int, repeated: bool
) -> dict[str, Callable[[], bytes] | Path]:
    args = source.family.megatron_args(sidecar_model(source, physical), steps, repeated) | {
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": options.parallel.get("tensor", 1),
        "pipeline_model_parallel_size": options.parallel.get("pipeline", 1),
        "expert_model_parallel_size": options.parallel.get("expert", 1),
        "expert_tensor_parallel_size": options.parallel.get("expert_tensor", 1),
    }
    multiple = options.padding * options.parallel.get("tensor", 1)
    if options.padding > 1:
        args["make_vocab_size_divisible_by"] = options.padding
        args["padded_vocab_size"] = -(-int(args["vocab_size"]) // multiple) * multiple
    small: dict[str, Callable[[], bytes] | Path] = {}
    for relative, path in sidecar.side_files(source.located.side).items():
        small[sidecar.carried(relative)] = path
    small[sidecar.carried("config.json")] = sidecar.config_file(source, physical)
    for relative, raw in sidecar.source_headers(source).items():
        small[sidecar.carried(relative)] = lambda raw=raw: raw  # type: ignore[misc]
    for relative, raw in sidecar.megatron_files(args, RELEASE, options.version).items():
        small[relative] = lambda raw=raw: raw  # type: ignore[misc]
    return small


def sidecar_model(source: Checkpoint, depths: int) -> Mapping[str, Any]:
    """The language model's config section with `depths` stored MTP depths."""
    return source.family.with_depths(source.model_config, depths) if depths else source.model_config


def _hf_small(source: Checkpoint, physical: int) -> dict[str, Callable[[], bytes] | Path]:
    small: dict[str, Callable[[], bytes] | Path] = dict(sidecar.side_files(source.located.side))
    small["config.json"] = sidecar.config_file(source, physical)
    return small


def _original_index(output: Output, index: bytes | None, headers: Mapping[str, bytes]) -> Output:
    """The source's own index, when exactly its shards are written again."""
    if index is None or {f.path for f in output.files} != headers.keys():
        return output
    return Output(output.files, dict.fromkeys(output.small, lambda: index))


def provenance(job: Job, files: tuple[Written, ...]) -> str:
    """mtp_convert.json: where every number came from, without times, hosts or users."""
    source = job.source
    lines = "".join(f"{s.tensor}\t{s.op}\t{' '.join(s.sources)}\n" for s in job.plan.steps)
    record = {
        "schema_version": 1,
        "tool": "mtp-convert",
        "version": __version__,
        "family": source.family.name,
        "source": {
            "name": source.located.given.name,
            "layout": source.layout.name,
            "container": source.stored.container,
            "dtypes": sorted({t.dtype.name for t in source.stored.tensors.values()}),
            "tensors": len(source.stored.tensors),
            "left_behind": [*source.unmapped, *sorted(source.stored.training)],
        },
        "layouts": _layouts(source),
        "target": {
            "layout": job.options.to,
            "words": dict(job.plan.target.words),
            "dtype": job.options.dtype,
            "megatron_version": job.options.megatron_version if job.options.to == "megatron" else None,
            "tensors": len(job.plan.steps),
        },
        "mtp": {"stored_depths": job.physical, "steps": job.steps, "repeated_layer": job.repeated},
        "provenance_digest": "xxh3_128:" + xxhash.xxh3_128_hexdigest(lines.encode()),
        "files": {f.path: {"bytes": f.size, "xxh3_128_of_4mib": f.digest} for f in files},
        "notes": list(job.notes),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _layouts(source: Checkpoint) -> dict[str, Any]:
    """The last form that the weights had in every layout, so that going back restores it."""
    before = source.provenance.get("layouts")
    now = {"words": dict(source.layout.words), "copies": sorted(source.copies)}
    return {**(before if isinstance(before, dict) else {}), source.layout.name: now}


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
    return [(s.st_size, s.st_mtime_ns) for s in (p.stat() for p in source.stored.files)]
