"""What every family supports, as data: for `families`, its JSON, and the generated pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mtp_convert import adapters
from mtp_convert.mapping.family import Family

WRITTEN = {"hf": ("safetensors",), "native": ("safetensors",), "megatron": ("torch_dist",)}
READ = ("dcp",)  # containers of the Megatron layout that are read and not written


@dataclass(frozen=True)
class FamilySupport:
    """One family.

    model_types: those of its own config; wrappers: those of larger models whose section it is. containers: by layout,
    what is written; read: what is read besides. variants: by layout, spellings that have a name. nested: whether the
    weights of a larger model's language part have a spelling of their own. depth_field: the config's count of MTP
    depths; released_depths, released_encodings: what published checkpoints store. megatron_since: the first
    Megatron-Core release with MTP in the model class. bridge_provider: Megatron-Bridge's class, where run_config.yaml
    is written.
    """

    name: str
    title: str
    model_types: list[str]
    wrappers: list[str]
    layouts: list[str]
    containers: dict[str, list[str]]
    read: list[str]
    variants: dict[str, list[str]]
    nested: bool
    depth_field: str
    released_depths: list[int]
    released_encodings: list[str]
    megatron_since: str
    bridge_provider: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """One row of the documented JSON object."""
        return asdict(self)


def support(f: Family) -> FamilySupport:
    """What a family supports."""
    containers = {layout: list(WRITTEN[layout]) for layout in f.choices}
    if "legacy" in f.forms:
        containers["megatron"].append("legacy")
    return FamilySupport(
        name=f.name,
        title=f.title,
        model_types=list(f.model_types),
        wrappers=list(f.wrappers),
        layouts=list(f.choices),
        containers=containers,
        read=list(READ) if "megatron" in f.choices else [],
        variants={layout: list(found) for layout, found in f.variants.items()},
        nested=bool(f.nested or f.wrappers),
        depth_field=f.depths.name,
        released_depths=list(f.released.depths),
        released_encodings=list(f.released.encodings),
        megatron_since=".".join(map(str, f.megatron_since)),
        bridge_provider=f.bridge_provider,
        notes=list(f.notes),
    )


def families() -> Iterator[FamilySupport]:
    """Every family, in the order of the registry."""
    return map(support, adapters.families())
