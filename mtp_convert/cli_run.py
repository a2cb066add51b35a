"""What several commands share: opening the source, making options, running and showing a conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mtp_convert.checkpoint import Checkpoint
    from mtp_convert.options import Options
    from mtp_convert.sources import Extent


def show(fmt: str, result: Shown, human: Callable[[Any], None]) -> None:
    """A result on stdout, in the format that was asked for."""
    from mtp_convert.render import show_json

    if fmt == "json":
        show_json(result.to_json())
    elif fmt == "human":
        human(result)


class Shown(Protocol):
    """A result that has a documented JSON form."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""


def open_source(
    src: str,
    hf_config: str | None,
    allow_unmapped: bool,
    layout: str | None = None,
    extent: Extent = "files",
    scratch: Path | None = None,
) -> Checkpoint:
    """Open SRC; with `layout`, refuse a source of another one. extent: what has to come here if it is on the Hub."""
    from mtp_convert import sources

    return sources.open_source(
        src, extent=extent, layout=layout, hf_config=hf_config, allow_unmapped=allow_unmapped, scratch=scratch
    )


def run_conversion(
    src: str, dst: Path, options: Options, source: Checkpoint, fmt: str, *, compare: bool = True
) -> None:
    """Convert, with progress, and show the result."""
    from mtp_convert import render
    from mtp_convert.convert import Result, prepare, run
    from mtp_convert.following import after
    from mtp_convert.progress import progress
    from mtp_convert.sources import bring, compared

    if compare:
        bring(compared(source), quiet=fmt != "human")
    job = prepare(source, options, compare=compare)
    bring(job.reads, quiet=fmt != "human")
    with progress("converting", job.nbytes, quiet=fmt != "human") as tick:
        result = run(job, dst, progress=tick)

    def human(r: Result) -> None:
        render.show_result(r, after(src, dst, source, options, r.steps))

    show(fmt, result, human)


def make_options(to: str, **given: Any) -> Options:  # noqa: ANN401 - forwarded to the record
    """The options record; sizes are parsed and parallel sizes collected."""
    from mtp_convert.options import Options, parse_size

    size = given.pop("max_shard_size", None)
    names = ("tensor", "pipeline", "expert", "expert_tensor", "virtual", "first", "last")
    sizes = {name: value for name in names if (value := given.pop(name, None)) is not None}
    if size:
        given |= {"max_shard_size": parse_size(size), "restore_shards": False}
    return Options(to, parallel=sizes, **given)


def show_plan(source: Checkpoint, options: Options, dst: Path | None, fmt: str) -> None:
    """Prepare a conversion and show it."""
    from mtp_convert import render
    from mtp_convert.convert import prepare
    from mtp_convert.inspection import describe

    show(fmt, describe(prepare(source, options, compare=source.stored.here), dst), render.show_plan)
