"""Everything a conversion can be told, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mtp_convert.errors import ConvertError, Problem

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
CURRENT_MEGATRON = "0.19"


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert.

    to: target layout. depths: physical MTP depths of the target (None: as stored). steps: MTP depths that Megatron
    runs (`mtp_num_layers`); more steps than one stored depth means a repeated layer. force_fold: what to do with
    unequal depths. variant: a named spelling of the target layout; words: single words of it. padding: vocabulary rows
    are padded to a multiple of this. encoding: how weights of a Hugging Face target are stored: auto (as they are,
    nothing is quantised unasked), source (as they once were), bf16 (no codes), fp8-block or mxfp4. container: the file
    format of a Megatron target, torch_dist or legacy. parallel: sizes by name (tensor, pipeline, expert,
    expert_tensor, virtual), and the decoder layers of the `first` and `last` stage; pipeline_layout: Megatron's string
    for any other division. part: the params that are written, all (empty) or a key of `parts.PARTS`.
    copies: what happens to stored copies that differ from their main tensor (`copies.POLICIES`).
    """

    to: str
    dtype: str = "auto"
    encoding: str = "auto"
    megatron_version: str = CURRENT_MEGATRON
    max_shard_size: int = 5 * 10**9
    restore_shards: bool = True
    depths: int | None = None
    steps: int | None = None
    force_fold: str | None = None
    padding: int = 1
    parallel: Mapping[str, int] = field(default_factory=dict)
    pipeline_layout: str = ""
    container: str = "torch_dist"
    part: str = ""
    copies: str = "compare"
    variant: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    force: bool = False

    @property
    def version(self) -> tuple[int, int]:
        """The Megatron-Core release as (major, minor)."""
        return parse_version(self.megatron_version)


def parse_version(text: str) -> tuple[int, int]:
    """`0.19` or `0.19.2` as (0, 19)."""
    parts = text.split(".")
    if len(parts) < 2 or not all(p.isdecimal() for p in parts[:2]):
        raise ConvertError("MTP001", Problem("--megatron-version", got=text, expected="a release like 0.19"))
    return int(parts[0]), int(parts[1])


def parse_size(text: str) -> int:
    """`5GB`, `500MiB` or a number of bytes."""
    clean = text.strip().upper().replace(" ", "")
    digits = clean.rstrip("KMGIB")
    unit = clean[len(digits) :] or "B"
    try:
        value = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise ConvertError("MTP001", Problem("size", got=text, expected="a number with B, KB, MB, GB, MiB or GiB"))
    return value
