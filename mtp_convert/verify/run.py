"""`verify`: two checkpoints of one family, level by level, to one verdict."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from time import monotonic

from mtp_convert import __version__
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.progress import Phases, silent
from mtp_convert.verify import levels
from mtp_convert.verify.options import VerifyOptions
from mtp_convert.verify.result import Section, SideFacts, Verification

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "megatron-core")


def verify(
    a: Checkpoint,
    b: Checkpoint,
    options: VerifyOptions | None = None,
    *,
    command: str = "",
    phases: Phases = silent,
) -> Verification:
    """Compare two checkpoints of one family in any two layouts, containers, shardings and encodings.

    command: how to do it again, for reports. phases: what is told how far the run is.

    Raises:
        ConvertError: MTP028 two families, MTP032 a model that cannot be run, MTP001 a device that is not there.
    """
    options = options or VerifyOptions()
    begin = monotonic()
    if a.family.name != b.family.name:
        raise ConvertError("MTP028", Problem("two families", got=f"{a.family.name} and {b.family.name}"))
    how = {"command": command} if command else {}
    a, b = _repeated_alike(a, b), _repeated_alike(b, a)
    found, difference = Verification(_facts(a), _facts(b), (), environment=how | environment()), None
    sections: list[Section] = []
    if "names" in options.levels:
        sections.append(levels.names(a, b))
    if "shapes" in options.levels:
        sections.append(levels.shapes(a, b))
    if "bits" in options.levels:
        with phases("comparing bits", a.stored.nbytes) as tick:
            section, difference = levels.bits(a, b, progress=tick)
        sections.append(section)
    unlike = [s.level for s in sections if s.level in ("names", "shapes") and not s.ok]
    if "forward" in options.levels and unlike:
        sections.append(Section("forward", 0, skipped=f"{' and '.join(unlike)} differ"))
    found = replace(found, sections=tuple(sections), mapping=() if unlike else levels.mapping(a, b))
    if "forward" in options.levels and not unlike:
        from mtp_convert.verify.parity import with_forward

        found = with_forward(found, a, b, options, difference, phases)
    return replace(found, seconds=round(monotonic() - begin, 3))


def _repeated_alike(c: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`c`, run as often as `other` says where `c` cannot say it: only Megatron's arguments and a few configs can."""
    silent = c.layout.name != "megatron" and c.dims.depths == 1 and not c.repeated
    return replace(c, steps=other.steps, repeated=True) if silent and other.repeated else c


def _facts(c: Checkpoint) -> SideFacts:
    dtypes = Counter(t.dtype.name for t in c.stored.in_files.values())
    return SideFacts(str(c.located.given), c.family.name, c.layout.name, c.stored.container, dict(dtypes.most_common()))


def environment() -> dict[str, str]:
    """Versions and machine, without host or user names."""
    found = {"mtp-convert": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
