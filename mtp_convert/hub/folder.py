"""A converted folder made ready for the Hub: checked against itself, its files read once, its card written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.engine.runner import Progress
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub.card import write_card
from mtp_convert.hub.plan import LocalFile, gather
from mtp_convert.hub.verified import read_verified
from mtp_convert.location import PROVENANCE, VERIFIED


@dataclass(frozen=True)
class Ready:
    """What goes up, by path, and what the user should know."""

    files: dict[str, LocalFile]
    notes: tuple[str, ...]


def prepare(folder: Path, repo: str, *, card: bool, force: bool, progress: Progress | None = None) -> Ready:
    """Check a folder and read its files.

    Args:
        repo: the name that the card shows. card: write one; otherwise README.md goes up as it is.
        force: take a folder whose verification failed.

    Raises:
        ConvertError: MTP002 the folder has no record, MTP061 it is not as it was written, MTP030 its verification
            failed; exit code 3 or 4 when config and tensors do not agree.
    """
    recorded = folder / PROVENANCE
    if not recorded.is_file():
        hint = "only what this tool wrote is uploaded: convert it, or use `hf upload`"
        raise ConvertError("MTP002", Problem(f"no {PROVENANCE}", str(folder)), hint=hint)
    checkpoint = open_checkpoint(folder)
    verified = read_verified(folder / VERIFIED, folder)
    if verified.failed and not force:
        hint = "`--force` uploads it all the same; the card will say so"
        raise ConvertError("MTP030", Problem("the verification beside it failed", VERIFIED), hint=hint)
    made = {} if verified.result is None else {VERIFIED: verified.public()}
    notes = list(verified.notes)
    if card:
        written = write_card(checkpoint, json.loads(recorded.read_bytes()), verified, repo)
        made |= written.files
        notes += written.notes
    return Ready(gather(folder, instead=made, progress=progress), tuple(notes))
