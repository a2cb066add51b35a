"""Recognises a checkpoint by what lies in its folder: the container, and where weights and side files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtp_convert.containers import megatron_legacy, safetensors, torch_dist
from mtp_convert.errors import ConvertError, Problem

LATEST = "latest_checkpointed_iteration.txt"
PROVENANCE = "mtp_convert.json"
VERIFIED = "mtp_convert_verify.json"  # the result of `verify --save`, beside what was verified
PICTURES = ("mtp_convert_errors.svg", "mtp_convert_depths.svg")  # of that result, beside a model card
CARRIED = "hf"  # folder beside a Megatron checkpoint with the Hugging Face side files


# The layouts that a container can hold; the first one is what is assumed where names alone cannot tell.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "safetensors": ("hf", "native"),
    "torch_dist": ("megatron",),
    "dcp": ("megatron",),
    "legacy": ("megatron",),
    "joined": ("hf", "native"),
    "module": ("native", "megatron", "hf"),
}


@dataclass(frozen=True)
class Located:
    """A checkpoint that was recognised: where its weights, its side files and its provenance file are.

    layout: the one that its names follow; before they are read, the one that is assumed. pinned: `org/name@commit`
    where it came from the Hub.
    """

    given: Path
    weights: Path
    side: Path
    root: Path
    layout: str
    container: str
    pinned: str = ""

    @property
    def shown(self) -> str:
        """What was read, as an answer names it."""
        return self.pinned or str(self.given)


def locate(path: Path) -> Located:
    """Recognise a folder by what lies in it.

    Raises:
        ConvertError: MTP002.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return Located(path, path, path.parent, path.parent, "hf", "safetensors")
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise ConvertError(
            "MTP002", Problem(what, str(path)), hint="SRC is a checkpoint folder or one .safetensors file"
        )
    weights = path
    if (path / LATEST).is_file():
        weights = _iteration(path)
    if container := _megatron_container(weights):
        root = path if weights != path else path.parent
        side = root / CARRIED if (root / CARRIED).is_dir() else path / CARRIED
        return Located(path, weights, side, root, "megatron", container)
    if (path / safetensors.INDEX).is_file() or any(path.glob("*.safetensors")):
        return Located(path, path, path, path, "hf", "safetensors")
    if (weights / "metadata.json").is_file():
        raise ConvertError("MTP013", Problem("file is missing", str(weights / torch_dist.METADATA)))
    raise ConvertError(
        "MTP002",
        Problem("no checkpoint", str(path), expected=f"*.safetensors, {LATEST}, {torch_dist.METADATA} or mp_rank_*"),
    )


def _megatron_container(weights: Path) -> str:
    """The container of an iteration folder, as Megatron-LM tells them apart; empty when it is none."""
    if (weights / torch_dist.METADATA).is_file():
        return "torch_dist"
    return "legacy" if megatron_legacy.is_legacy(weights) else ""


def _iteration(root: Path) -> Path:
    text = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        folder = root / "release"
    elif text.isdecimal():
        folder = root / f"iter_{int(text):07d}"
    else:
        raise ConvertError("MTP013", Problem("no iteration", LATEST, repr(text[:40]), "a number or 'release'"))
    if not folder.is_dir():
        raise ConvertError("MTP013", Problem("no such folder", LATEST, folder.name))
    return folder
