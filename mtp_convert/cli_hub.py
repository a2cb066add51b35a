"""Commands that write to the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_convert import cli_run
from mtp_convert.cli_options import DryRun, Format, option
from mtp_convert.errors import ConvertError, Problem

if TYPE_CHECKING:
    from mtp_convert.hub.push import Pushed

PANEL = "Hub"
MOST_LISTED = 30

Private = Annotated[
    bool | None,
    option(
        "--private/--public",
        help="Who sees it; refused when it is the other way round. A new repository is private unless --public.",
        panel=PANEL,
        env="PRIVATE",
    ),
]
Branch = Annotated[
    str,
    option("--branch", "--revision", help="Branch to bring up to date; made if need be.", panel=PANEL, env="BRANCH"),
]
PullRequest = Annotated[
    bool, option("--pr", "--create-pr", help="Open a pull request on main instead.", panel=PANEL, env="PR")
]
Message = Annotated[str, option("--message", "-m", help="Title of the commit.", panel=PANEL, env="MESSAGE")]
Card = Annotated[
    bool,
    option(
        "--card/--no-card",
        help="Write the model card from what is known of the conversion, or take README.md as it is.",
        panel=PANEL,
        env="CARD",
    ),
]
Over = Annotated[
    bool,
    option(
        "--force",
        help="Replace weights that this tool did not put there; upload in spite of a failed verification.",
        panel=PANEL,
        env="FORCE",
    ),
]
Retries = Annotated[
    int, option("--retries", help="Attempts for what the Hub or network refuses.", panel=PANEL, env="RETRIES", least=1)
]
RetryWait = Annotated[
    float,
    option(
        "--retry-wait", help="Seconds before the second attempt; doubles from there.", panel=PANEL, env="RETRY_WAIT"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("push", rich_help_panel=PANEL)(push)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that this tool wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name; made if it is not there.")],
    private: Private = None,
    branch: Branch = "main",
    pr: PullRequest = False,
    message: Message = "Upload converted checkpoint",
    dry_run: DryRun = False,
    card: Card = True,
    force: Over = False,
    retries: Retries = 5,
    retry_wait: RetryWait = 1.0,
    fmt: Format = "human",
) -> None:
    """Upload a converted folder: compared by digest, complete in one commit, repeatable."""
    if pr and branch != "main":
        raise ConvertError("MTP001", Problem("--pr opens a pull request on main", got=f"--branch {branch}"))
    from mtp_convert.hub.client import Hub, Patience
    from mtp_convert.hub.folder import prepare
    from mtp_convert.hub.push import PushOptions
    from mtp_convert.hub.push import push as upload
    from mtp_convert.progress import progress

    quiet = fmt != "human"
    hub = Hub(repo, Patience(retries, retry_wait), bars=not quiet and sys.stderr.isatty())
    nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    with progress("checking", nbytes, quiet=quiet) as tick:
        ready = prepare(folder, repo, card=card, force=force, progress=tick)
    options = PushOptions(private, branch, pr, message, dry_run, force)
    cli_run.show(fmt, upload(ready.files, hub, options, notes=ready.notes), show_pushed)


def show_pushed(p: Pushed) -> None:
    """What happened to every file, in a few lines."""
    from mtp_convert import render
    from mtp_convert.summary import printable, size_text

    visibility = "private" if p.private else "public"
    state = f"{visibility}, {'new' if p.created else 'there already'}"
    print(render.paint(f"{'would push to' if p.dry_run else 'pushed to'} {p.repo}", "bold"))
    rows = {"new": p.new, "changed": p.changed, "deleted": p.deleted, "same": p.same, "kept": p.kept}
    sizes = f"{size_text(p.nbytes_to_send)} to send of {size_text(p.nbytes)}"
    render.facts(
        [
            ("repository", f"{p.url} ({state})"),
            ("target", p.target),
            *[(name, _listed(paths)) for name, paths in rows.items() if paths],
            ("size", sizes if p.dry_run else size_text(p.nbytes)),
            *([("commit", p.commit)] if p.commit else []),
            *([("pull request", p.pull_request)] if p.pull_request else []),
            *[("note", printable(note)) for note in p.notes],
        ]
    )


def _listed(paths: list[str]) -> str:
    more = f", ... ({len(paths) - MOST_LISTED} more)" if len(paths) > MOST_LISTED else ""
    return f"{len(paths)}: {', '.join(paths[:MOST_LISTED])}{more}"
