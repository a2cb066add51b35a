"""The converting commands, made from one table: which options each has, and which layouts it goes between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from mtp_convert import cli_options as o
from mtp_convert import cli_run

if TYPE_CHECKING:
    from mtp_convert.sources import Extent

Group = Mapping[str, tuple[Any, Any]]  # parameter -> its type with the option, and its default

INPUT: Group = {
    "hf_config": (o.HfConfig, None),
    "allow_unmapped": (o.AllowUnmapped, False),
    "copies": (o.Copies, "compare"),
}
OUTPUT: Group = {
    "dtype": (o.DtypeOption, "auto"),
    "max_shard_size": (o.Shard, ""),
    "force": (o.Force, False),
    "threads": (o.Threads, None),
}
MEGATRON: Group = {
    "megatron_version": (o.Version, "0.19"),
    "steps": (o.Steps, None),
    "tensor": (o.Tp, 1),
    "pipeline": (o.Pp, 1),
    "expert": (o.Ep, 1),
    "expert_tensor": (o.Etp, None),
    "virtual": (o.Vpp, 1),
    "first": (o.First, None),
    "last": (o.Last, None),
    "pipeline_layout": (o.PipelineLayout, ""),
    "container": (o.Container, "torch_dist"),
    "padding": (o.Padding, 1),
}
VARIANT: Group = {"variant": (o.Variant, "")}
ENCODING: Group = {"encoding": (o.Encoding, "auto")}
PLAN: Group = {"dry_run": (o.DryRun, False)}
FORMAT: Group = {"fmt": (o.Format, "human")}
OF_TARGET: Mapping[str, tuple[Group, ...]] = {"hf": (VARIANT, ENCODING), "megatron": (MEGATRON,), "native": (VARIANT,)}
TITLES = {"hf": "Hugging Face folder", "megatron": "Megatron checkpoint", "native": "native module tree"}


class Given(NamedTuple):
    """What a command was given, apart from its own options."""

    src: str
    dst: Path | None
    source: str | None  # the layout that the command names
    target: str


def register(app: typer.Typer) -> None:
    """Add `A-to-B` for every two layouts, `convert` and `plan`."""
    for source in TITLES:
        for target in TITLES:
            if source == target:
                continue
            groups = (INPUT, *OF_TARGET[target], OUTPUT, FORMAT)
            run = _command(_run, groups, source=source, target=target)
            run.__doc__ = f"{TITLES[source]} -> {TITLES[target]}."
            app.command(f"{source}-to-{target}", rich_help_panel="Convert")(run)
    every = (INPUT, VARIANT, ENCODING, MEGATRON, OUTPUT, PLAN, FORMAT)
    convert = _command(_run, every)
    convert.__doc__ = "The general form: the source is detected."
    app.command("convert", rich_help_panel="Convert")(convert)
    stored = {k: OUTPUT[k] for k in ("dtype", "max_shard_size")}
    plan = _command(_plan, (INPUT, VARIANT, ENCODING, stored, FORMAT), dst=False)
    plan.__doc__ = "Every tensor's origin and op, bytes, peak memory and free disk; nothing is written."
    app.command("plan", rich_help_panel="Look")(plan)


def _command(
    act: Callable[..., None],
    groups: tuple[Group, ...],
    *,
    source: str | None = None,
    target: str | None = None,
    dst: bool = True,
) -> Callable[..., None]:
    """A function with the parameters of `groups`, as typer reads them from a signature."""

    def run(**given: Any) -> None:  # noqa: ANN401 - typer hands over what the signature says
        where = Given(given.pop("src"), given.pop("dst", None), source, given.pop("to", target))
        act(where, **given)

    words: dict[str, tuple[Any, Any]] = {"src": (o.Src, Parameter.empty)}
    if dst:
        words["dst"] = (o.Dst, Parameter.empty)
    if target is None:
        words["to"] = (o.To, Parameter.empty)
    for group in groups:
        words.update(group)
    keyword = Parameter.KEYWORD_ONLY
    run.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in words.items()]
    )
    run.__annotations__ = {name: kind for name, (kind, _) in words.items()}
    return run


def _run(
    where: Given, *, hf_config: str | None, allow_unmapped: bool, fmt: str, dry_run: bool = False, **given: object
) -> None:
    options = cli_run.make_options(where.target, **given)
    extent: Extent = "headers" if dry_run else "files"
    source = cli_run.open_source(where.src, hf_config, allow_unmapped, where.source, extent)
    assert where.dst is not None
    if dry_run:
        cli_run.show_plan(source, options, where.dst, fmt)
    else:
        cli_run.run_conversion(where.src, where.dst, options, source, fmt)


def _plan(where: Given, *, hf_config: str | None, allow_unmapped: bool, fmt: str, **given: object) -> None:
    options = cli_run.make_options(where.target, **given)
    source = cli_run.open_source(where.src, hf_config, allow_unmapped, extent="headers")
    cli_run.show_plan(source, options, None, fmt)
