"""mtp_convert.json: what an output folder remembers about where every number came from, and what going back needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from mtp_convert import __version__, shifts
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.encoded import count_encodings
from mtp_convert.encodings.dtype import FLOATS
from mtp_convert.engine.runner import Written
from mtp_convert.mapping.layout import Layout

if TYPE_CHECKING:
    from mtp_convert.convert import Job


def remembered(source: Checkpoint, layout: str) -> Mapping[str, Any]:
    """What an earlier conversion noted about the form that the weights had in `layout` (nothing if they never had)."""
    layouts = source.provenance.get("layouts")
    found = layouts.get(layout) if isinstance(layouts, dict) else None
    return found if isinstance(found, dict) else {}


def words(source: Checkpoint, layout: str) -> Mapping[str, str]:
    """The spelling of the target: the source's, or the one the weights had before; else the released one."""
    if source.located.layout == layout:
        return source.layout.words
    noted = remembered(source, layout).get("words")
    known = source.family.choices[layout]
    return {w: s for w, s in noted.items() if s in known.get(w, ())} if isinstance(noted, dict) else {}


def copies(source: Checkpoint, target: Layout) -> frozenset[str]:
    """Copies are written iff the weights had them in this layout."""
    if source.located.layout == target.name:
        return source.copies & target.copies.keys()
    noted = remembered(source, target.name).get("copies")
    return frozenset(c for c in noted if c in target.copies) if isinstance(noted, list) else frozenset()


def dtypes(source: Checkpoint, layout: str) -> dict[str, str]:
    """The element types, by tensor, of what another layout had to store in a type of its own."""
    noted = remembered(source, layout).get("dtypes")
    found = {n: d for n, d in noted.items() if d in FLOATS} if isinstance(noted, dict) else {}
    return {**found, **{n: note.partition(" ")[0] for n, note in shifted(source, layout).items()}}


def shifted(source: Checkpoint, layout: str) -> Mapping[str, str]:
    """What `shifts.noted` noted when the weights left the layout."""
    noted = remembered(source, layout).get("shifted")
    found = noted.items() if isinstance(noted, dict) else ()
    return {n: note for n, note in found if isinstance(note, str) and note.partition(" ")[0] in FLOATS}


def padded(source: Checkpoint, target: Layout) -> dict[str, int]:
    """Rows of padded vocabulary tensors, if the weights had padding in this layout."""
    if source.located.layout == target.name:
        noted: object = _padded_now(source)
    else:
        noted = remembered(source, target.name).get("padded")
    if not isinstance(noted, dict):
        return {}
    vocab = {n: b.shape[0] for n, b in target.bindings.items() if b.vocab}
    return {n: r for n, r in noted.items() if n in vocab and isinstance(r, int) and vocab[n] < r < 2 * vocab[n] + 2**16}


def _padded_now(source: Checkpoint) -> dict[str, int]:
    found = {b.tensor: source.tensor(b.tensor).shape[0] for b in source.layout.bindings.values() if b.vocab}
    return {n: rows for n, rows in found.items() if rows != source.layout.bindings[n].shape[0]}


def record(job: Job, files: tuple[Written, ...]) -> str:
    """mtp_convert.json: where every number came from, without times, hosts or users."""
    source = job.source
    lines = "".join(f"{s.tensor}\t{s.op}\t{' '.join(s.sources)}\n" for s in job.plan.steps)
    facts = {
        "schema_version": 1,
        "tool": "mtp-convert",
        "version": __version__,
        "family": source.family.name,
        "source": {
            "name": source.located.pinned or source.located.given.name,
            "layout": source.layout.name,
            "container": source.stored.container,
            "dtypes": sorted({t.dtype.name for t in source.stored.in_files.values()}),
            "encodings": count_encodings(t.encoding for t in source.stored.tensors.values()),
            "tensors": len(source.stored.in_files),
            "left_behind": [*source.unmapped, *sorted(source.stored.training)],
        },
        "layouts": _layouts(job),
        "target": {
            "layout": job.options.to,
            "container": job.options.container if job.options.to == "megatron" else "safetensors",
            "part": job.options.part,
            "words": dict(job.plan.target.words),
            "dtype": job.options.dtype,
            "encodings": count_encodings(job.recoding.weights.values()),
            "megatron_version": job.options.megatron_version if job.options.to == "megatron" else None,
            "tensors": len(job.plan.steps),
        },
        "mtp": {"stored_depths": job.physical, "steps": job.steps, "repeated_layer": job.repeated},
        "provenance_digest": "xxh3_128:" + xxhash.xxh3_128_hexdigest(lines.encode()),
        "files": {f.path: {"bytes": f.size, "xxh3_128_of_4mib": f.digest} for f in files},
        "notes": list(job.notes),
    }
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def _layouts(job: Job) -> dict[str, Any]:
    """The last form that the weights had in every layout, so that going back restores it."""
    source, steps = job.source, job.plan.steps
    before = source.provenance.get("layouts")
    forced = {n: step.binding.dtype for step in steps if step.binding.dtype for n in step.sources}
    now = {
        "words": dict(source.layout.words),
        "copies": sorted(source.copies),
        "padded": _padded_now(source),
        "dtypes": {n: own for n, to in forced.items() if (own := source.tensor(n).dtype.name) != to},
        "shifted": shifts.noted(source, steps if job.options.dtype == "auto" else ()),
    }
    return {**(before if isinstance(before, dict) else {}), source.layout.name: now}
