"""The command line: parse, call one function of the package, render. Nothing heavy is imported before it is used."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mtp_convert.errors import ERRORS, ConvertError, Problem

if TYPE_CHECKING:
    from mtp_convert.checkpoint import Checkpoint
    from mtp_convert.options import Options

MOST_PROBLEMS = 20

app = typer.Typer(
    name="mtp-convert",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
    help="Convert checkpoints with Multi-Token Prediction heads between Hugging Face and Megatron layouts: by table, "
    "streaming, in constant memory, refusing instead of guessing.",
    epilog="Examples:  mtp-convert inspect DIR  |  mtp-convert hf-to-megatron DIR OUT  |  mtp-convert roundtrip DIR",
)


def option(*names: str, help: str, panel: str, env: str) -> Any:  # noqa: ANN401 - typer's own names
    """An option with its MTP_CONVERT_* variable."""
    return typer.Option(*names, help=help, rich_help_panel=panel, envvar=f"MTP_CONVERT_{env}", show_envvar=False)


Src = Annotated[
    Path,
    typer.Argument(help="Checkpoint folder (Hugging Face, or Megatron torch_dist: root or iter_*)."),
]
Dst = Annotated[Path, typer.Argument(help="Output folder; must not exist.")]
HfConfig = Annotated[
    Path | None,
    option(
        "--hf-config",
        help="config.json (or its folder) for a Megatron source without one.",
        panel="Input",
        env="HF_CONFIG",
    ),
]
AllowUnmapped = Annotated[
    bool,
    option(
        "--allow-unmapped",
        help="Leave tensors behind that the family does not know; they are listed.",
        panel="Input",
        env="ALLOW_UNMAPPED",
    ),
]
DtypeOption = Annotated[
    str,
    option("--dtype", help="auto (as stored), bf16, fp16 or fp32.", panel="Output", env="DTYPE"),
]
Shard = Annotated[
    str,
    option("--max-shard-size", help="Largest output file.", panel="Output", env="MAX_SHARD_SIZE"),
]
Force = Annotated[
    bool,
    option("--force", help="Replace DST once the new one is complete.", panel="Output", env="FORCE"),
]
Threads = Annotated[int | None, option("--threads", help="Copy threads.", panel="Output", env="THREADS")]
Version = Annotated[
    str,
    option(
        "--megatron-version",
        help="Megatron-Core release that will read it.",
        panel="Megatron",
        env="MEGATRON_VERSION",
    ),
]
Steps = Annotated[
    int | None,
    option(
        "--mtp-num-layers",
        help="MTP depths to run; more than one over one stored depth is a repeated layer.",
        panel="Megatron",
        env="MTP_NUM_LAYERS",
    ),
]
Tp = Annotated[
    int,
    option(
        "--tp",
        "--tensor-model-parallel-size",
        help="Checked, and written to args; torch_dist loads at any size.",
        panel="Megatron",
        env="TP",
    ),
]
Pp = Annotated[
    int,
    option("--pp", "--pipeline-model-parallel-size", help="As --tp.", panel="Megatron", env="PP"),
]
Ep = Annotated[int, option("--ep", "--expert-model-parallel-size", help="As --tp.", panel="Megatron", env="EP")]
Etp = Annotated[
    int,
    option("--etp", "--expert-tensor-parallel-size", help="As --tp.", panel="Megatron", env="ETP"),
]
Padding = Annotated[
    int,
    option(
        "--make-vocab-size-divisible-by",
        help="Pad vocabulary rows to a multiple of this times --tp.",
        panel="Megatron",
        env="MAKE_VOCAB_SIZE_DIVISIBLE_BY",
    ),
]
Format = Annotated[str, option("--format", help="human, json or quiet.", panel="Display", env="FORMAT")]


def _choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConvertError("MTP001", Problem(name, got=value, expected=" or ".join(allowed)))
    return value


def _open(src: Path, hf_config: Path | None, allow_unmapped: bool, layout: str | None = None) -> Checkpoint:
    from mtp_convert.checkpoint import locate, open_checkpoint

    if layout and (found := locate(src).layout) != layout:
        hint = f"use `mtp-convert convert {src} DST --to ...`, which detects the source"
        raise ConvertError("MTP003", Problem("source layout", str(src), found, layout), hint=hint)
    return open_checkpoint(src, hf_config=hf_config, allow_unmapped=allow_unmapped)


def _convert(src: Path, dst: Path, options: Options, source: Checkpoint, fmt: str) -> None:
    from mtp_convert import parallel, render
    from mtp_convert.convert import prepare, run
    from mtp_convert.progress import progress

    _choice(fmt, "--format", ("human", "json", "quiet"))
    _choice(options.dtype, "--dtype", ("auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"))
    parallel.check(source.family.megatron_args(source.model_config, 0, False), options.parallel)
    job = prepare(source, options)
    with progress("converting", job.nbytes, quiet=fmt != "human") as tick:
        result = run(job, dst, progress=tick)
    if fmt == "json":
        render.show_json({"schema_version": 1, **result.__dict__, "files": [f.path for f in result.files]})
    elif fmt == "human":
        back = "megatron-to-hf" if options.to == "megatron" else "hf-to-megatron"
        render.show_result(result, f"mtp-convert diff {src} {dst}   or back: mtp-convert {back} {dst} OUT")


def _options(to: str, **given: Any) -> Options:  # noqa: ANN401 - forwarded to the record
    from mtp_convert.options import Options, parse_size

    size = given.pop("max_shard_size", None)
    sizes = {k: given.pop(k, 1) for k in ("tensor", "pipeline", "expert", "expert_tensor")}
    if bad := [k for k, n in sizes.items() if n < 1]:
        raise ConvertError(
            "MTP001",
            Problem(f"{bad[0]} parallel size", got=str(sizes[bad[0]]), expected="1 or more"),
        )
    if size:
        given |= {"max_shard_size": parse_size(size), "restore_shards": False}
    return Options(to, parallel=sizes, **given)


@app.command("hf-to-megatron", rich_help_panel="Convert")
def hf_to_megatron(
    src: Src,
    dst: Dst,
    dtype: DtypeOption = "auto",
    megatron_version: Version = "0.19",
    mtp_num_layers: Steps = None,
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    etp: Etp = 1,
    make_vocab_size_divisible_by: Padding = 1,
    max_shard_size: Shard = "",
    allow_unmapped: AllowUnmapped = False,
    force: Force = False,
    threads: Threads = None,
    fmt: Format = "human",
) -> None:
    """Hugging Face folder -> Megatron torch_dist checkpoint."""
    options = _options(
        "megatron",
        dtype=dtype,
        megatron_version=megatron_version,
        steps=mtp_num_layers,
        tensor=tp,
        pipeline=pp,
        expert=ep,
        expert_tensor=etp,
        padding=make_vocab_size_divisible_by,
        max_shard_size=max_shard_size,
        force=force,
        threads=threads,
    )
    _convert(src, dst, options, _open(src, None, allow_unmapped, "hf"), fmt)


@app.command("megatron-to-hf", rich_help_panel="Convert")
def megatron_to_hf(
    src: Src,
    dst: Dst,
    hf_config: HfConfig = None,
    dtype: DtypeOption = "auto",
    max_shard_size: Shard = "",
    allow_unmapped: AllowUnmapped = False,
    force: Force = False,
    threads: Threads = None,
    fmt: Format = "human",
) -> None:
    """Megatron torch_dist checkpoint -> Hugging Face folder."""
    options = _options("hf", dtype=dtype, max_shard_size=max_shard_size, force=force, threads=threads)
    _convert(src, dst, options, _open(src, hf_config, allow_unmapped, "megatron"), fmt)


To = Annotated[str, typer.Option("--to", help="Target layout: hf or megatron.", envvar="MTP_CONVERT_TO")]


@app.command("convert", rich_help_panel="Convert")
def convert(
    src: Src,
    dst: Dst,
    to: To,
    hf_config: HfConfig = None,
    dtype: DtypeOption = "auto",
    megatron_version: Version = "0.19",
    mtp_num_layers: Steps = None,
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    etp: Etp = 1,
    make_vocab_size_divisible_by: Padding = 1,
    max_shard_size: Shard = "",
    allow_unmapped: AllowUnmapped = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    force: Force = False,
    threads: Threads = None,
    fmt: Format = "human",
) -> None:
    """The general form: the source is detected."""
    _choice(to, "--to", ("hf", "megatron"))
    options = _options(
        to,
        dtype=dtype,
        megatron_version=megatron_version,
        steps=mtp_num_layers,
        tensor=tp,
        pipeline=pp,
        expert=ep,
        expert_tensor=etp,
        padding=make_vocab_size_divisible_by,
        max_shard_size=max_shard_size,
        force=force,
        threads=threads,
    )
    source = _open(src, hf_config, allow_unmapped)
    if dry_run:
        _show_plan(source, options, dst, fmt)
    else:
        _convert(src, dst, options, source, fmt)


def _show_plan(source: Checkpoint, options: Options, dst: Path | None, fmt: str) -> None:
    from mtp_convert import render
    from mtp_convert.convert import prepare
    from mtp_convert.inspection import describe

    planned = describe(prepare(source, options), dst)
    if _choice(fmt, "--format", ("human", "json", "quiet")) == "json":
        render.show_json(planned.to_json())
    elif fmt == "human":
        render.show_plan(planned)


@app.command("plan", rich_help_panel="Look")
def plan(
    src: Src,
    to: To,
    hf_config: HfConfig = None,
    dtype: DtypeOption = "auto",
    max_shard_size: Shard = "",
    allow_unmapped: AllowUnmapped = False,
    fmt: Format = "human",
) -> None:
    """Every tensor's origin and op, bytes, peak memory and free disk; nothing is written."""
    _choice(to, "--to", ("hf", "megatron"))
    options = _options(to, dtype=dtype, max_shard_size=max_shard_size)
    _show_plan(_open(src, hf_config, allow_unmapped), options, None, fmt)


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

    found = inspect_checkpoint(_open(src, hf_config, allow_unmapped))
    if _choice(fmt, "--format", ("human", "json", "quiet")) == "json":
        render.show_json(found.to_json())
    elif fmt == "human":
        render.show_inspection(found)


@app.command("roundtrip", rich_help_panel="Check")
def roundtrip(
    src: Src,
    via: Annotated[str, typer.Option("--via", help="Layout in between; default: the other one.")] = "",
    hf_config: HfConfig = None,
    scratch: Annotated[Path | None, typer.Option("--scratch", help="Folder for the temporary files.")] = None,
    fmt: Format = "human",
) -> None:
    """There and back: every byte compared, nothing kept. Exit code 5 when anything differs."""
    from mtp_convert import render
    from mtp_convert import roundtrip as rt
    from mtp_convert.progress import progress

    source = _open(src, hf_config, False)
    via = via or ("megatron" if source.layout.name == "hf" else "hf")
    options = _options(_choice(via, "--via", ("hf", "megatron")))
    with progress("there, back, compare", 3 * source.stored.nbytes, quiet=fmt != "human") as tick:
        result = rt.roundtrip(source, options, scratch=scratch, progress=tick)
    if fmt == "json":
        render.show_json(result.to_json())
    elif fmt == "human":
        render.show_roundtrip(result)
    if not result.ok:
        raise typer.Exit(5)


@app.command("diff", rich_help_panel="Check")
def diff(
    a: Src,
    b: Annotated[Path, typer.Argument(help="The other checkpoint, in any layout.")],
    hf_config: HfConfig = None,
    allow_unmapped: AllowUnmapped = False,
    fmt: Format = "human",
) -> None:
    """Tensor-level difference between two checkpoints of any two layouts. Exit code 5 when they differ."""
    from mtp_convert import difference, render
    from mtp_convert.progress import progress

    left, right = _open(a, hf_config, allow_unmapped), _open(b, hf_config, allow_unmapped)
    with progress("comparing", left.stored.nbytes, quiet=fmt != "human") as tick:
        found = difference.diff(left, right, progress=tick)
    if _choice(fmt, "--format", ("human", "json", "quiet")) == "json":
        render.show_json(found.to_json())
    elif fmt == "human":
        render.show_difference(found)
    if not found.equal:
        raise typer.Exit(5)


@app.command("fold", rich_help_panel="Convert")
def fold(
    src: Src,
    dst: Dst,
    force_fold: Annotated[str, typer.Option("--force-fold", help="For unequal depths: mean or first.")] = "",
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """Equal MTP depths -> one stored depth (repeated layer), same layout."""
    if force_fold:
        _choice(force_fold, "--force-fold", ("mean", "first"))
    source = _open(src, hf_config, False)
    options = _options(source.layout.name, depths=1, force_fold=force_fold or None, force=force)
    _convert(src, dst, options, source, fmt)


@app.command("unfold", rich_help_panel="Convert")
def unfold(
    src: Src,
    dst: Dst,
    depths: Annotated[int, typer.Option("--depths", min=1, help="Equal depths to write.")],
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """One stored MTP depth -> several equal ones, same layout."""
    source = _open(src, hf_config, False)
    _convert(src, dst, _options(source.layout.name, depths=depths, force=force), source, fmt)


@app.command("families", rich_help_panel="Look")
def families(fmt: Format = "human") -> None:
    """What is supported."""
    from mtp_convert import adapters, render

    rows = [
        {
            "name": f.name,
            "title": f.title,
            "model_types": list(f.model_types),
            "layouts": list(f.choices),
            "notes": list(f.notes),
        }
        for f in adapters.families()
    ]
    if fmt == "json":
        render.show_json({"schema_version": 1, "families": rows})
        return
    for f in adapters.families():
        print(f"{f.name}: {f.title}\n  model_type {', '.join(f.model_types)}; layouts {', '.join(f.choices)}")
        for note in f.notes:
            print(f"  - {note}")


@app.command("explain", rich_help_panel="Look")
def explain(code: Annotated[str, typer.Argument(help="An error code, e.g. MTP025.")]) -> None:
    """What an error code means."""
    kind = ERRORS.get(code.upper())
    if kind is None:
        raise ConvertError("MTP001", Problem("no such code", got=code, expected=", ".join(ERRORS)))
    print(f"{code.upper()}: {kind.title} (exit code {kind.exit_code})\n{kind.explanation}")


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


def report(error: ConvertError) -> None:
    """An error on stderr: code, every problem, hint."""
    from mtp_convert.summary import printable

    first, *more = [printable(p.line()) for p in error.problems]
    print(f"error[{error.code}]: {error.kind.title}: {first}", file=sys.stderr)
    for line in more[: MOST_PROBLEMS - 1]:
        print(f"  {line}", file=sys.stderr)
    if len(more) >= MOST_PROBLEMS:
        print(f"  ... and {len(more) - MOST_PROBLEMS + 1} more", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except ConvertError as error:
        if debug:
            raise
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        code = 130
    except _Terminated:
        print("terminated: nothing was left behind", file=sys.stderr)
        code = 143
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _other(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception, debug: bool) -> int:
    """Usage errors of the parser, and our own mistakes."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        print("interrupted", file=sys.stderr)
        return 130
    if debug:
        raise error
    print(f"error[MTP090]: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    print("hint: please report it with the output of --debug", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
