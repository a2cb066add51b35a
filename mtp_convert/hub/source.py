"""Names of repositories on the Hub, and which of a repository's files a command needs. Nothing is asked or moved here.

    org/name    org/name@revision    hf://org/name[@revision]

A revision is a branch, a tag, a commit or `refs/pr/N`. A file or folder of the same name wins over the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtp_convert.containers import safetensors, torch_dist
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import CARRIED, LATEST, PROVENANCE
from mtp_convert.quantization import HF_QUANT
from mtp_convert.sidecar import SOURCE_ENCODING, SOURCE_HEADERS, WEIGHTS, travels

SCHEME = "hf://"
LONGEST = 96  # characters of a name on the Hub
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^\s@]+))?")
# What says which model this is and how it is stored: all that is fetched in whole to look at a checkpoint.
DESCRIPTION = ("config.json", HF_QUANT, safetensors.INDEX, PROVENANCE, LATEST)
DIST_DESCRIPTION = (torch_dist.METADATA, torch_dist.MEGATRON_FILE, torch_dist.COMMON_FILE)
KEPT = (f"{SOURCE_HEADERS}/", f"{SOURCE_ENCODING}/")  # for the way back
KEPT_CARRIED = tuple(f"{CARRIED}/{folder}" for folder in KEPT)
LOOKED_AT = (*DESCRIPTION, *(f"{CARRIED}/{name}" for name in DESCRIPTION))


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, and the revision that was asked for (None: its default branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse(text: str) -> HubName | None:
    """The repository that SRC names; None where it names a path.

    Raises:
        ConvertError: MTP001 for an hf:// name that is none.
    """
    marked = text.startswith(SCHEME)
    if not marked and Path(text).exists():
        return None
    name = text.removeprefix(SCHEME)
    found = _NAME.fullmatch(name)
    usable = found is not None and len(found["repo"]) <= LONGEST and not any(w in found["repo"] for w in ("--", ".."))
    if found is not None and usable and (marked or not name.endswith(".safetensors")):
        return HubName(found["repo"], found["revision"])
    if marked:
        raise ConvertError(
            "MTP001", Problem("no repository", got=text, expected=f"{SCHEME}org/name or {SCHEME}org/name@revision")
        )
    return None


@dataclass(frozen=True, slots=True)
class Needed:
    """The files of a repository that a conversion reads.

    weights: one form of the model, as `locate` prefers them. side: what is carried along or kept for the way back.
    megatron: whether the weights are a Megatron checkpoint. describing: those files that say what is in the others;
    empty where only the others do.
    """

    weights: tuple[str, ...]
    side: tuple[str, ...]
    megatron: bool = False
    describing: tuple[str, ...] = ()


def needed(files: Mapping[str, int], shards: Collection[str], tracker: str | None) -> Needed:
    """Sort out the files of a repository by name and size.

    Args:
        files: bytes of every file. shards: what the index of a safetensors folder names; empty without one.
        tracker: text of `latest_checkpointed_iteration.txt`, if there is one.
    """
    looked_at = [f for f in LOOKED_AT if f in files]
    folder = f"{_iteration(tracker)}/" if tracker is not None else ""
    if folder + torch_dist.METADATA in files or any(f.startswith(folder + "mp_rank_") for f in files):
        weights = [f for f in files if f.startswith(folder) and not f.startswith(f"{CARRIED}/")]
        side = [f for f in files if f.startswith(f"{CARRIED}/")]
        describing = [f for f in weights if f.removeprefix(folder) in DIST_DESCRIPTION]
        if folder + torch_dist.METADATA in files:
            describing += [f for f in side if f.startswith(KEPT_CARRIED) and not f.endswith(WEIGHTS)]
        return Needed(tuple(sorted(weights)), tuple(sorted({*side, *looked_at})), True, tuple(sorted(describing)))
    single = sorted(f for f in files if f.endswith(".safetensors") and "/" not in f)
    if not shards and safetensors.SINGLE in single:
        single = [safetensors.SINGLE]
    side = [f for f, size in files.items() if f.startswith(KEPT) or travels(f, size)]
    return Needed(tuple(sorted(set(shards) or single)), tuple(sorted({*side, *looked_at})))


def _iteration(tracker: str) -> str:
    """The folder that a tracker file names; `locate` judges it."""
    text = tracker.strip()
    return f"iter_{int(text):07d}" if text.isdecimal() else text
