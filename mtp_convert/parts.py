"""Parts of a model that can be a checkpoint of their own: the MTP heads, alone or with the ends that they share."""

from __future__ import annotations

from mtp_convert.mapping.layout import Layout, narrowed

ENDS = ("embedding", "head")  # params that an MTP head shares with its model
PARTS: dict[str, tuple[str, ...]] = {"mtp": (), "mtp-with-ends": ENDS}  # part -> params besides those of the depths


def of_depths(param: str) -> bool:
    """Whether a param belongs to an MTP depth."""
    return param.startswith("mtp.")


def part_of(layout: Layout, part: str) -> Layout:
    """The tensors of a part; all of them where `part` is empty."""
    if not part:
        return layout
    return narrowed(layout, lambda param: of_depths(param) or param in PARTS[part])
