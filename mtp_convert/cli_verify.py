"""The command that proves a conversion with real forward passes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtp_convert import cli_run
from mtp_convert.cli_options import HfConfig, Src, option
from mtp_convert.location import VERIFIED

if TYPE_CHECKING:
    from mtp_convert.verify.result import Verification

HOW, OUT = "How", "Output"

Dtype = Annotated[
    Literal["float32", "bfloat16", "float64"],
    option("--dtype", help="Type of the computation.", panel=HOW, env="VERIFY_DTYPE"),
]
Device = Annotated[
    str, option("--device", help="cpu, cuda, cuda:1; auto: a GPU when there is one.", panel=HOW, env="DEVICE")
]
Mode = Annotated[
    Literal["auto", "whole", "streamed"],
    option("--mode", help="streamed: one layer's weights at a time.", panel=HOW, env="VERIFY_MODE"),
]
Quick = Annotated[
    bool, option("--quick", help="A sample of layers, each on random input: for pull requests.", panel=HOW, env="QUICK")
]
Rows = Annotated[int, option("--rows", help="Rows of tokens.", panel=HOW, env="VERIFY_ROWS", least=1)]
Length = Annotated[int, option("--length", help="Tokens per row.", panel=HOW, env="VERIFY_LENGTH", least=4)]
Seed = Annotated[int, option("--seed", help="Of the token ids.", panel=HOW, env="VERIFY_SEED", least=0)]
Backend = Annotated[
    Literal["", "megatron-core"],
    option("--backend", help="megatron-core: the installed one runs the Megatron side.", panel=HOW, env="BACKEND"),
]
Levels = Annotated[str, option("--levels", help="Some of names,shapes,bits,forward.", panel=HOW, env="VERIFY_LEVELS")]
Tolerances = Annotated[
    Path | None,
    option(
        "--baseline",
        help="JSON file of largest relative errors by place; they replace the measured thresholds.",
        panel=HOW,
        env="BASELINE",
    ),
]
WriteTolerances = Annotated[
    Path | None,
    option("--write-baseline", help="Write such a file from this run's errors.", panel=OUT, env="WRITE_BASELINE"),
]
Report = Annotated[
    Path | None, option("--report", help="One HTML file that opens offline.", panel=OUT, env="VERIFY_REPORT")
]
Junit = Annotated[Path | None, option("--junit", help="JUnit XML file.", panel=OUT, env="VERIFY_JUNIT")]
Svg = Annotated[
    Path | None, option("--svg", help="Folder for the report's pictures, for a model card.", panel=OUT, env="SVG")
]
VerifyFormat = Annotated[
    Literal["human", "json", "github", "quiet"],
    option("--format", help="What goes to stdout.", panel=OUT, env="VERIFY_FORMAT"),
]
Save = Annotated[
    bool, option("--save", help=f"Write the result into B as {VERIFIED}, for `push`.", panel=OUT, env="SAVE")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify", rich_help_panel="Check")(verify)


def verify(
    a: Src,
    b: Annotated[str, typer.Argument(metavar="B", help="The other checkpoint: any layout, container and encoding.")],
    dtype: Dtype = "float32",
    device: Device = "auto",
    mode: Mode = "auto",
    quick: Quick = False,
    rows: Rows = 2,
    length: Length = 64,
    seed: Seed = 0,
    backend: Backend = "",
    wanted: Levels = "names,shapes,bits,forward",
    baseline: Tolerances = None,
    write_baseline: WriteTolerances = None,
    report: Report = None,
    junit: Junit = None,
    svg: Svg = None,
    save: Save = False,
    hf_config: HfConfig = None,
    fmt: VerifyFormat = "human",
) -> None:
    """Run both checkpoints and compare every layer and MTP depth. Exit code 5 when they are not the same model."""
    from mtp_convert.progress import progress, silent
    from mtp_convert.verify import baselines
    from mtp_convert.verify.options import VerifyOptions, parse_levels
    from mtp_convert.verify.run import verify as run

    levels = parse_levels(wanted)
    tolerances = baselines.read(baseline) if baseline else {}
    left, right = (cli_run.open_source(side, hf_config, False) for side in (a, b))
    options = VerifyOptions(rows, length, seed, dtype, device, mode, levels, backend, quick, tolerances)
    command = shlex.join(["mtp-convert", *sys.argv[1:]])
    found = run(left, right, options, command=command, phases=progress if fmt == "human" else silent)
    if write_baseline:
        baselines.write(write_baseline, found)
    _files(found, report, junit, svg, right.located.root / VERIFIED if save else None)
    _show(found, fmt)
    if not found.ok:
        raise typer.Exit(5)


def _files(v: Verification, report: Path | None, junit: Path | None, svg: Path | None, saved: Path | None) -> None:
    """Everything that was asked for beside stdout."""
    import json

    from mtp_convert.verify.junit import junit_xml
    from mtp_convert.verify.pictures import depth_bars_svg, error_plot_svg
    from mtp_convert.verify.report import write_html

    if report:
        write_html(v, report)
    texts = {} if junit is None else {junit: junit_xml(v)}
    if svg:
        texts |= {svg / "errors.svg": error_plot_svg(v), svg / "depths.svg": depth_bars_svg(v)}
    if saved:
        texts[saved] = json.dumps(v.to_json(), indent=1) + "\n"
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _show(v: Verification, fmt: str) -> None:
    if fmt == "github":
        from mtp_convert.verify.github import publish

        publish(v)
        return
    from mtp_convert.render_verify import show_verification

    cli_run.show(fmt, v, show_verification)
