"""The package for programs and notebooks: what the command line does, with results that print well.

    from mtp_convert import api

    api.inspect("org/name")                                  # headers only
    api.convert("org/name", "out", "megatron")               # or Options("megatron", parallel={"tensor": 2}, ...)
    api.verify("org/name", "out", quick=True)
    for name, tensor in api.iter_tensors(module, to="hf"): ...

SRC is a folder, `org/name`, `org/name@revision` or `hf://org/name` everywhere. Every function raises `ConvertError`,
with a code of `mtp-convert explain`, where the command line would end with an exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_convert import support
from mtp_convert.convert import Result, prepare, run
from mtp_convert.difference import CheckpointDifference
from mtp_convert.difference import diff as compare
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import ConvertError
from mtp_convert.explanation import Explanation, explain_in
from mtp_convert.inspection import Inspection, Planned, describe, inspect_checkpoint
from mtp_convert.options import Options
from mtp_convert.progress import Phases, silent
from mtp_convert.sources import open_source
from mtp_convert.support import FamilySupport

if TYPE_CHECKING:
    from mtp_convert.live import Loaded, iter_tensors, load_into, save_from
    from mtp_convert.verify.options import VerifyOptions
    from mtp_convert.verify.result import Verification

__all__ = [
    "CheckpointDifference",
    "ConvertError",
    "Explanation",
    "FamilySupport",
    "Inspection",
    "Loaded",
    "Options",
    "Planned",
    "Result",
    "Verification",
    "VerifyOptions",
    "convert",
    "diff",
    "explain",
    "families",
    "inspect",
    "iter_tensors",
    "load_into",
    "plan",
    "save_from",
    "verify",
]
# What needs torch, and where it is: imported when it is first asked for.
_WITH_TORCH = {
    **dict.fromkeys(("Loaded", "iter_tensors", "load_into", "save_from"), "mtp_convert.live"),
    "Verification": "mtp_convert.verify.result",
    "VerifyOptions": "mtp_convert.verify.options",
}

Src = str | Path


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the names above
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WITH_TORCH[name]), name)


def inspect(src: Src, *, hf_config: Src | None = None, allow_unmapped: bool = False) -> Inspection:
    """Family, layout, MTP depths, types (sizes in bytes), copies and problems of a checkpoint, from headers alone.

    Raises:
        ConvertError: exit code 3 for damaged files, 4 when config and tensors disagree, 7 for the Hub.
    """
    source = open_source(str(src), extent="headers", hf_config=_text(hf_config), allow_unmapped=allow_unmapped)
    return inspect_checkpoint(source)


def plan(src: Src, to: str | Options, *, hf_config: Src | None = None) -> Planned:
    """Every tensor's origin and op, bytes, peak memory and free disk (both in bytes) of a conversion; writes nothing.

    Raises:
        ConvertError: as `inspect`; exit code 4 when the source cannot be expressed in the target.
    """
    source = open_source(str(src), extent="headers", hf_config=_text(hf_config))
    return describe(prepare(source, _options(to), compare=source.stored.here), None)


def convert(
    src: Src,
    dst: Src,
    to: str | Options,
    *,
    hf_config: Src | None = None,
    allow_unmapped: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Convert a checkpoint into the folder `dst`, which is absent or complete afterwards.

    progress: called with numbers of bytes as they are written, from several threads.

    Raises:
        ConvertError: as `plan`; exit code 6 for a full disk, 73 when `dst` exists, 75 when another run writes it.
    """
    source = open_source(str(src), hf_config=_text(hf_config), allow_unmapped=allow_unmapped)
    return run(prepare(source, _options(to)), Path(dst), progress=progress)


def verify(
    a: Src,
    b: Src,
    options: VerifyOptions | None = None,
    *,
    hf_config: Src | None = None,
    phases: Phases = silent,
    **changed: Any,  # noqa: ANN401 - the fields of `VerifyOptions`
) -> Verification:
    """Run two checkpoints and compare every layer and MTP depth; `changed` are single fields of `VerifyOptions`.

    phases: is told how far the run is; `mtp_convert.progress.progress` draws bars.

    Source: the sides are transformers' model with MTP modules, and the Megatron-named tree of this package.

    Raises:
        ConvertError: as `inspect`; exit code 4 for two families, or a model that nothing here can run.
    """
    from dataclasses import replace

    from mtp_convert.verify.options import VerifyOptions
    from mtp_convert.verify.run import verify as judged

    left, right = (open_source(str(side), hf_config=_text(hf_config)) for side in (a, b))
    return judged(left, right, replace(options or VerifyOptions(), **changed), phases=phases)


def diff(a: Src, b: Src, *, hf_config: Src | None = None, progress: Progress | None = None) -> CheckpointDifference:
    """Which params of two checkpoints of one family differ in value, by how much, and what may have happened.

    Raises:
        ConvertError: as `inspect`; exit code 4 for two families.
    """
    left, right = (open_source(str(side), hf_config=_text(hf_config)) for side in (a, b))
    return compare(left, right, progress=progress)


def explain(src: Src, name: str, *, hf_config: Src | None = None) -> Explanation:
    """One tensor or param of a checkpoint: its op, and its name and shape in every layout.

    Raises:
        ConvertError: MTP029 when there is none of this name; near misses are suggested.
    """
    return explain_in(open_source(str(src), extent="headers", hf_config=_text(hf_config), allow_unmapped=True), name)


def families() -> tuple[FamilySupport, ...]:
    """Every family, and what is supported of it."""
    return tuple(support.families())


def _options(to: str | Options) -> Options:
    return to if isinstance(to, Options) else Options(to)


def _text(path: Src | None) -> str | None:
    return None if path is None else str(path)
