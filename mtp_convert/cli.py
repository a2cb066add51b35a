"""The command line: parse, call one function of the package, render. Nothing heavy is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mtp_convert import cli_convert, cli_hub, cli_run, cli_surgery, cli_verify
from mtp_convert.cli_errors import guarded
from mtp_convert.cli_options import (
    AllowUnmapped,
    Depths,
    Dst,
    FamilyOption,
    Force,
    ForceFold,
    Format,
    HfConfig,
    Scratch,
    Src,
    Variant,
    Via,
)
from mtp_convert.errors import ERRORS, ConvertError, Problem

app = typer.Typer(
    name="mtp-convert",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
    help="Convert checkpoints with Multi-Token Prediction heads between Hugging Face, Megatron and native layouts: "
    "by table, streaming, in constant memory, refusing instead of guessing.",
    epilog="Examples:  mtp-convert inspect DIR  |  mtp-convert hf-to-megatron DIR OUT  |  mtp-convert roundtrip DIR",
)
cli_convert.register(app)
cli_surgery.register(app)
cli_verify.register(app)
cli_hub.register(app)


@app.command("inspect", rich_help_panel="Look")
def inspect(
    src: Src,
    hf_config: HfConfig = None,
    allow_unmapped: AllowUnmapped = False,
    fmt: Format = "human",
) -> None:
    """Family, layout, MTP depths, types, copies and problems, from headers alone."""
    from mtp_convert import render
    from mtp_convert.inspection import inspect_checkpoint

    found = inspect_checkpoint(cli_run.open_source(src, hf_config, allow_unmapped, extent="headers"))
    cli_run.show(fmt, found, render.show_inspection)


@app.command("roundtrip", rich_help_panel="Check")
def roundtrip(
    src: Src,
    via: Via = "",
    variant: Variant = "",
    hf_config: HfConfig = None,
    scratch: Scratch = None,
    fmt: Format = "human",
) -> None:
    """There and back: every byte compared, nothing kept. Exit code 5 when anything differs."""
    from mtp_convert import render
    from mtp_convert import roundtrip as rt
    from mtp_convert.progress import progress

    source = cli_run.open_source(src, hf_config, False)
    other = "megatron" if source.layout.name == "hf" else "hf"
    options = cli_run.make_options(via or other, variant=variant)
    with progress("there, back, compare", 3 * source.stored.nbytes, quiet=fmt != "human") as tick:
        result = rt.roundtrip(source, options, scratch=scratch, progress=tick)
    cli_run.show(fmt, result, render.show_roundtrip)
    if not result.ok:
        raise typer.Exit(5)


@app.command("diff", rich_help_panel="Check")
def diff(
    a: Src,
    b: Annotated[str, typer.Argument(help="The other checkpoint, in any layout.")],
    hf_config: HfConfig = None,
    allow_unmapped: AllowUnmapped = False,
    fmt: Format = "human",
) -> None:
    """Tensor-level difference between two checkpoints of any two layouts. Exit code 5 when they differ."""
    from mtp_convert import difference, render
    from mtp_convert.progress import progress

    left, right = cli_run.open_source(a, hf_config, allow_unmapped), cli_run.open_source(b, hf_config, allow_unmapped)
    with progress("comparing", left.stored.nbytes, quiet=fmt != "human") as tick:
        found = difference.diff(left, right, progress=tick)
    cli_run.show(fmt, found, render.show_difference)
    if not found.equal:
        raise typer.Exit(5)


@app.command("check", rich_help_panel="Check")
def check(
    folder: Annotated[Path, typer.Argument(help="A folder that this tool wrote.")],
    fmt: Format = "human",
) -> None:
    """An output folder against its own digests, like an fsck. Exit code 3 when a file is damaged."""
    from mtp_convert import fsck, render
    from mtp_convert.progress import progress

    total = sum(size for size, _ in fsck.recorded(folder).values())
    with progress("checking", total, quiet=fmt != "human") as tick:
        found = fsck.check_folder(folder, progress=tick)
    cli_run.show(fmt, found, render.show_check)
    if found.problems:
        raise typer.Exit(3)


@app.command("fold", rich_help_panel="Convert")
def fold(
    src: Src,
    dst: Dst,
    force_fold: ForceFold = "",
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """Equal MTP depths -> one stored depth (repeated layer), same layout."""
    source = cli_run.open_source(src, hf_config, False)
    options = cli_run.make_options(source.layout.name, depths=1, force_fold=force_fold or None, force=force)
    cli_run.run_conversion(src, dst, options, source, fmt)


@app.command("unfold", rich_help_panel="Convert")
def unfold(
    src: Src,
    dst: Dst,
    depths: Depths,
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """One stored MTP depth -> several equal ones, same layout."""
    source = cli_run.open_source(src, hf_config, False)
    cli_run.run_conversion(src, dst, cli_run.make_options(source.layout.name, depths=depths, force=force), source, fmt)


@app.command("families", rich_help_panel="Look")
def families(fmt: Format = "human") -> None:
    """What is supported."""
    from mtp_convert import render, support

    found = list(support.families())
    if fmt == "json":
        render.show_json({"schema_version": 1, "families": [f.to_json() for f in found]})
    elif fmt == "human":
        render.show_families(found)


@app.command("explain", rich_help_panel="Look")
def explain(
    name: Annotated[
        str, typer.Argument(metavar="NAME|CODE", help="A tensor or param of any layout, or a code like MTP025.")
    ],
    src: Annotated[
        str | None, typer.Argument(metavar="[SRC]", help="Checkpoint whose sizes and spelling count.")
    ] = None,
    family: FamilyOption = "",
    hf_config: HfConfig = None,
    fmt: Format = "human",
) -> None:
    """Where one tensor is in every layout, or what an error code means."""
    from mtp_convert import explanation, render
    from mtp_convert.demo import shipped

    if name.upper().startswith("MTP") and name[3:].isdecimal():
        kind = ERRORS.get(name.upper())
        if kind is None:
            raise ConvertError("MTP001", Problem("no such code", got=name, expected=", ".join(ERRORS)))
        print(f"{name.upper()}: {kind.title} (exit code {kind.exit_code})\n{kind.explanation}")
        return
    if src is not None:
        found = explanation.explain_in(cli_run.open_source(src, hf_config, True, extent="headers"), name)
    else:
        found = explanation.explain_name(name, family or None, shipped("configs"))
    cli_run.show(fmt, found, render.show_explanation)


@app.command("env", rich_help_panel="Look")
def env() -> None:
    """Versions and machine, to paste into a bug report."""
    import os
    import platform
    from importlib.metadata import version as installed

    from mtp_convert import __version__

    print(f"mtp-convert {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"{os.cpu_count()} cores")
    for package in ("torch", "safetensors", "transformers", "huggingface-hub", "typer", "numpy", "xxhash"):
        print(f"{package} {installed(package)}")


@app.command("demo", rich_help_panel="Look")
def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--fixture", help="Hugging Face folder; default: the shipped fixture."),
    ] = None,
) -> None:
    """The main job on the shipped fixture: inspect, convert, convert back, compare bytes, run both sides."""
    from mtp_convert import demo as story

    raise typer.Exit(story.run_demo(folder))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks for errors.", envvar="MTP_CONVERT_DEBUG")] = False,
) -> None:
    """Shared options."""
    if version:
        from mtp_convert import __version__

        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Entry point of the console script."""
    guarded(app)


if __name__ == "__main__":
    main()
