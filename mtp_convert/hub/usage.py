"""How a published checkpoint is run, and how it goes back: commands for a model card, none of which was run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.following import serving
from mtp_convert.location import CARRIED
from mtp_convert.summary import printable

_PINNED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


def linked(name: str) -> str:
    """The source's name, as a link where it is a commit on the Hub."""
    shown = f"`{printable(name).replace('`', chr(39)).replace('|', '&#124;')}`"
    if found := _PINNED.fullmatch(name):
        return f"[{shown}](https://huggingface.co/{found['repo']}/tree/{found['commit']})"
    return shown


def command(record: Mapping[str, Any]) -> str:
    """The command that was typed, or, where the record has none, the one that its options amount to."""
    if isinstance(recorded := record.get("command"), str):
        return recorded
    source, target = record.get("source", {}), record.get("target", {})
    words = ["mtp-convert", "convert", str(source.get("name")), "OUT", "--to", str(target.get("layout"))]
    if target.get("part"):
        words = ["mtp-convert", "extract", str(source.get("name")), "OUT", "--to", str(target.get("layout"))]
        words += ["--without-ends"] if target["part"] == "mtp" else []
    if target.get("dtype", "auto") != "auto":
        words += ["--dtype", str(target["dtype"])]
    if target.get("container") == "legacy":
        words += ["--container", "legacy"]
    if target.get("megatron_version"):
        words += ["--megatron-version", str(target["megatron_version"])]
    return shlex.join(words)


def run_it(c: Checkpoint, repo: str) -> str:
    """Commands for the programs that load this layout."""
    head = (
        "## Run it\n\nNone of these commands was run for this card; which releases know the model is theirs to say.\n\n"
    )
    if c.layout.name == CARRIED:
        return head + _block(serving(c.steps, repo))
    if c.layout.name == "megatron":
        lines = [
            f"hf download {shlex.quote(repo)} --local-dir CHECKPOINT",
            "# then, for Megatron-LM's own scripts:",
            "--load CHECKPOINT --use-checkpoint-args --finetune",
        ]
        return f"{head}{_block(lines)}\n{_vllm_after(repo)}"
    return f"{head}{_vllm_after(repo)}"


def _vllm_after(repo: str) -> str:
    back = f"mtp-convert convert {shlex.quote(repo)} OUT --to hf"
    return "vLLM and SGLang load the Hugging Face layout:\n\n" + _block([back, "vllm serve OUT"])


def go_back(record: Mapping[str, Any], repo: str) -> str:
    """How the source's layout comes back, and how the files are checked."""
    layout = str(record.get("source", {}).get("layout", CARRIED))
    lines = [
        f"hf download {shlex.quote(repo)} --local-dir CHECKPOINT",
        "mtp-convert check CHECKPOINT",
        f"mtp-convert convert CHECKPOINT SOURCE --to {shlex.quote(layout)}",
    ]
    words = "Names, order, types and copies of the source are recorded in `mtp_convert.json`.\n"
    return f"## Go back\n\n{words}\n{_block(lines)}"


def _block(lines: list[str]) -> str:
    return "```sh\n" + "".join(f"{line}\n" for line in lines) + "```\n"
