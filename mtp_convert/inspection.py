"""What a checkpoint is, from headers alone; and what a conversion would do, from a plan alone."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import Place, StoredTensor
from mtp_convert.convert import Job
from mtp_convert.encoded import count_encodings
from mtp_convert.engine.runner import THREADS, WINDOW
from mtp_convert.readable import Readable
from mtp_convert.recoding import once_coded
from mtp_convert.summary import Row, collapse

SCHEMA = 1
BASE_MEMORY = 32 << 20  # bytes; the interpreter and the headers of a few thousand tensors
TORCH_MEMORY = 230 << 20  # `import torch`, where element types change or depths are averaged
SCRATCH_PER_THREAD = 12 << 20
CODES_PER_THREAD = 12 << 20  # a strip of values, as it is stored and as float32, and its codes


@dataclass(frozen=True)
class Inspection(Readable):
    """Facts about one checkpoint."""

    path: str
    family: str
    title: str
    layout: str
    container: str
    parallel: dict[str, int]
    spelling: dict[str, str]
    tensors: int
    objects: int
    nbytes: int
    dtypes: dict[str, int]
    encodings: dict[str, int]
    activation_scales: int
    mtp_stored_depths: int
    mtp_steps: int
    mtp_repeated_layer: bool
    mtp_tensors: int
    tied_embeddings: bool
    copies: list[str]
    left_behind: list[str]
    files: list[str]
    notes: list[str]
    rows: list[Row] = field(default_factory=list, repr=False)
    mtp_rows: list[Row] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object (schema_version 1)."""
        return {"schema_version": SCHEMA, **asdict(self)}


def inspect_checkpoint(c: Checkpoint) -> Inspection:
    """Summarise an opened checkpoint."""
    mtp = [n for n, b in c.layout.bindings.items() if b.parts[0].param.startswith("mtp.")]
    fixed = c.family.fixed(c.layout.name, c.stored.container)
    released = {**c.family.default_words(c.layout.name, c.dims), **fixed}
    main = [n for n in (*c.layout.bindings, *sorted(c.copies)) if n not in set(mtp)]
    return Inspection(
        path=c.located.shown,
        family=c.family.name,
        title=c.family.title,
        layout=c.layout.name,
        container=c.stored.container,
        parallel=dict(c.stored.parallel),
        spelling={w: s for w, s in c.layout.words.items() if s != released[w]},
        tensors=len(c.stored.in_files),
        objects=len(c.stored.objects),
        nbytes=c.stored.nbytes,
        dtypes=dict(Counter(t.dtype.name for t in c.stored.in_files.values()).most_common()),
        encodings=count_encodings(t.encoding for t in c.stored.tensors.values()),
        activation_scales=len(c.stored.beside),
        mtp_stored_depths=c.dims.depths,
        mtp_steps=c.steps,
        mtp_repeated_layer=c.repeated,
        mtp_tensors=len(mtp),
        tied_embeddings=c.dims.tied,
        copies=sorted(c.copies),
        left_behind=[*c.unmapped, *sorted(c.stored.training)],
        files=[_file(c, place) for place in c.stored.files],
        notes=[*c.notes, *once_coded(c)],
        rows=_rows(c, main),
        mtp_rows=_rows(c, mtp),
    )


def _file(c: Checkpoint, place: Place) -> str:
    """A file of payload; ranks have files of the same name."""
    if isinstance(place, Path) and c.stored.parallel:
        return place.relative_to(c.located.weights).as_posix()
    return place.name


def _rows(c: Checkpoint, names: list[str]) -> list[Row]:
    stored = (c.tensor(n) for n in names)
    return collapse((t.name, t.nbytes, (_kind(t), t.shape)) for t in stored)


def _kind(tensor: StoredTensor) -> str:
    return tensor.dtype.name if tensor.encoding is None else tensor.encoding.scheme.kind


@dataclass(frozen=True)
class Planned(Readable):
    """What a conversion would do."""

    source: str
    source_layout: str
    target_layout: str
    tensors: int
    nbytes: int
    files: int
    mtp_stored_depths: int
    mtp_steps: int
    mtp_repeated_layer: bool
    peak_memory: int
    free_disk: int
    encodings: dict[str, int]
    notes: list[str]
    steps: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rows: list[Row] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object (schema_version 1); every tensor, uncollapsed."""
        data = asdict(self)
        del data["rows"]
        return {"schema_version": SCHEMA, **data}


def describe(job: Job, target: Path | None) -> Planned:
    """Summarise a prepared job."""
    threads = job.options.threads or THREADS
    place = next((p for p in (target or Path.cwd()).absolute().parents if p.exists()), Path("/"))
    tensors = job.source.stored.tensors
    steps = [
        {"tensor": s.tensor, "shape": list(s.shape), "op": s.op, "sources": list(s.sources)} for s in job.plan.steps
    ]
    codes = job.recoding.weights
    sizes = {s.tensor: prod(s.shape) * tensors[s.sources[0]].dtype.itemsize for s in job.plan.steps}
    sizes |= {n: sum(t.nbytes for t in e.raw) for n, e in codes.items()}
    per_thread = WINDOW + SCRATCH_PER_THREAD + (CODES_PER_THREAD if codes.keys() - job.recoding.copied else 0)
    values = job.options.dtype != "auto" or any(s.averaged > 1 for s in job.plan.steps)
    return Planned(
        source=job.source.located.shown,
        source_layout=job.source.layout.name,
        target_layout=job.options.to,
        tensors=len(job.plan.steps),
        nbytes=job.nbytes,
        files=len(job.output.files),
        mtp_stored_depths=job.physical,
        mtp_steps=job.steps,
        mtp_repeated_layer=job.repeated,
        peak_memory=BASE_MEMORY + (TORCH_MEMORY if values else 0) + threads * per_thread,
        free_disk=shutil.disk_usage(place).free,
        encodings=count_encodings(codes.values()),
        notes=list(job.notes),
        steps=steps,
        rows=collapse((s.tensor, sizes[s.tensor], (s.op, _origin(s.sources))) for s in job.plan.steps),
    )


def _origin(sources: tuple[str, ...]) -> str:
    """Where a tensor comes from, numbers left out so that equal rows of different layers meet."""
    names = collapse((n, 0, ()) for n in sources)
    return ", ".join(".".join("#" if w.isdecimal() else w for w in r.name.split(".")) for r in names)
