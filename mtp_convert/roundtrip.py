"""There and back: a checkpoint is converted, converted back, and every byte compared with the source."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_convert.checkpoint import Checkpoint, open_checkpoint
from mtp_convert.containers.base import StoredTensor
from mtp_convert.convert import prepare, run
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.megatron_target import FORMATS, PACKED
from mtp_convert.options import Options
from mtp_convert.readable import Readable


@dataclass(frozen=True)
class RoundTrip(Readable):
    """What came back. `differing`: one line per tensor that is not bit-identical."""

    path: str
    via: str
    tensors: int
    nbytes: int
    missing: list[str]
    unexpected: list[str]
    differing: list[str]
    same_config: bool
    same_files: bool

    @property
    def ok(self) -> bool:
        """Every tensor came back bit for bit, under its name, in its type."""
        return not (self.missing or self.unexpected or self.differing) and self.same_config

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        return {"schema_version": 1, "ok": self.ok, **self.__dict__}


def roundtrip(
    source: Checkpoint,
    options: Options,
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> RoundTrip:
    """Convert to `options.to` and back in a temporary folder and compare; nothing is kept.

    Raises:
        ConvertError: MTP028 for a form that is read only.
    """
    home = source.layout.name
    form = PACKED if source.layout.words.get("experts") == PACKED else source.stored.container
    if form in (PACKED, "dcp"):
        problem = Problem("the way back", got=f"{form}, which is read and not written", expected=", ".join(FORMATS))
        raise ConvertError("MTP028", problem, hint="convert it, then compare both with `mtp-convert diff`")
    with tempfile.TemporaryDirectory(prefix="mtp-convert-", dir=scratch) as folder:
        there, back = Path(folder) / "there", Path(folder) / "back"
        run(prepare(source, options), there, progress=progress)
        config = None if (there / "hf").is_dir() or options.to != "megatron" else source.located.side
        middle = open_checkpoint(there, layout=options.to, hf_config=config)
        encoding = "source" if source.stored.raw else "auto"
        home_options = replace(options, to=home, dtype="auto", encoding=encoding, steps=None, variant="")
        if home == "megatron":
            home_options = replace(home_options, container=source.stored.container)
        run(prepare(middle, home_options), back, progress=progress)
        returned = open_checkpoint(back, layout=home)
        return _compare(source, returned, options.to, progress)


def _compare(source: Checkpoint, back: Checkpoint, via: str, progress: Progress | None) -> RoundTrip:
    before, after = source.stored.in_files, back.stored.in_files
    left_behind = set(source.unmapped)
    differing = []
    reader = Reader()
    try:
        for name in before.keys() & after.keys():
            a, b = before[name], after[name]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                differing.append(f"{name}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}")
            elif (d := compare(_true_rows(source, a), _true_rows(source, b), reader, progress=progress)) is not None:
                differing.append(f"{name}: {d.text()}")
    finally:
        reader.close()
    return RoundTrip(
        str(source.located.given),
        via,
        len(before),
        source.stored.nbytes,
        sorted(before.keys() - after.keys() - left_behind),
        sorted(after.keys() - before.keys()),
        sorted(differing),
        _meaning(source) == _meaning(back),
        source.stored.headers == back.stored.headers and bool(source.stored.headers),
    )


def _true_rows(c: Checkpoint, tensor: StoredTensor) -> StoredExtent:
    """The tensor without vocabulary padding: those rows are no params, and training leaves anything in them."""
    binding = c.layout.bindings.get(tensor.name)
    return StoredExtent(tensor, rows=binding.shape[0] if binding is not None and binding.vocab else None)


def _meaning(c: Checkpoint) -> dict[str, Any]:
    """The config with the stored number of depths, which a conversion is allowed to correct."""
    return c.family.depths.corrected(c.model_config, c.dims.depths)
