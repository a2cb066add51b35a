"""Commands that take MTP heads off, out, on, or make them."""

from __future__ import annotations

from typing import Annotated

import typer

from mtp_convert import cli_run
from mtp_convert.cli_options import Dst, Ends, Force, Format, HeadsTo, HfConfig, NewDepths, Src

PANEL = "MTP heads"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (extract, graft, drop, init):
        app.command(command.__name__, rich_help_panel=PANEL)(command)


def extract(
    src: Src,
    dst: Dst,
    with_ends: Ends = True,
    to: HeadsTo = "hf",
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """The MTP heads alone, under their released names: a draft checkpoint for vLLM or SGLang, or heads to graft."""
    scratch = next(p for p in dst.absolute().parents if p.is_dir())
    source = cli_run.open_source(src, hf_config, False, extent="ranges", scratch=scratch)
    options = cli_run.make_options(to, part="mtp-with-ends" if with_ends else "mtp", force=force)
    compare = with_ends or not source.located.pinned  # from the Hub, what is not written is not moved
    cli_run.run_conversion(src, dst, options, source, fmt, compare=compare)


def graft(
    base: Src,
    heads: Annotated[str, typer.Argument(metavar="HEADS", help="Checkpoint, or extracted heads, of the same model.")],
    dst: Dst,
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """The decoder of SRC with the MTP heads of HEADS. Heads that SRC has are replaced."""
    from mtp_convert.surgery import graft as joined

    source = joined(cli_run.open_source(base, hf_config, False), cli_run.open_source(heads, hf_config, False))
    cli_run.run_conversion(base, dst, cli_run.make_options(source.layout.name, force=force), source, fmt)


def drop(src: Src, dst: Dst, hf_config: HfConfig = None, force: Force = False, fmt: Format = "human") -> None:
    """The model without its MTP heads; the config says so."""
    source = cli_run.open_source(src, hf_config, False)
    options = cli_run.make_options(source.layout.name, depths=0, force=force)
    cli_run.run_conversion(src, dst, options, source, fmt)


def init(
    src: Src,
    dst: Dst,
    depths: NewDepths = 1,
    hf_config: HfConfig = None,
    force: Force = False,
    fmt: Format = "human",
) -> None:
    """New MTP heads for a model without: copies of its last decoder layer that pass the hidden state on."""
    from mtp_convert.surgery import init as joined

    source = joined(cli_run.open_source(src, hf_config, False), depths)
    cli_run.run_conversion(src, dst, cli_run.make_options(source.layout.name, force=force), source, fmt)
