"""Reading a config.json: numbers that are checked, the field that counts MTP depths, rope settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_convert.mapping.family import Config, ConfigError, DepthField

MOST = 1 << 16  # experts, layers or depths; a layout lists every one of them


def number(config: Config, field: str, most: int = 2**40) -> int:
    """A positive whole number of the config, at most `most`."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ConfigError(f"{field} must be a positive whole number up to {most}, got {value!r}")
    return value


def optional(config: Config, field: str, most: int = 2**40) -> int:
    """The same, or 0 where the field is absent, null or 0."""
    return number(config, field, most) if config.get(field) not in (None, 0) else 0


def either(config: Config, *fields: str, most: int = 2**40) -> int:
    """A positive whole number that has several names: the first of them that is there."""
    return number(config, next((f for f in fields if config.get(f) is not None), fields[0]), most)


def depth_field(name: str, *others: str) -> DepthField:
    """The usual way to count MTP depths: one field, absent or 0 in models without MTP; it counts stored depths, so a
    repeated layer counts once."""

    def declared(config: Config) -> int:
        return optional(config, name, MOST)

    def corrected(config: Config, depths: int) -> dict[str, Any]:
        return {**config, name: depths}

    return DepthField(declared, corrected, name, others=others)


def silent_depth_field(name: str) -> DepthField:
    """The same where released configs lack the field: a config without it may have any one stored depth, or none."""
    usual = depth_field(name)

    def counts(config: Config) -> bool:
        return config.get(name) is not None

    def corrected(config: Config, depths: int) -> dict[str, Any]:
        return usual.corrected(config, depths) if counts(config) or depths > 1 else dict(config)

    return DepthField(usual.declared, corrected, name, counts)


def flags(config: Config, field: str, layers: int, meaning: Mapping[Any, bool]) -> tuple[bool, ...] | None:
    """A list with an entry per layer, as what the entries mean; None where the config has no such list. Entries for MTP
    layers, behind those of the decoder, are left out."""
    found = config.get(field)
    if found is None:
        return None
    known = " or ".join(dict.fromkeys(map(repr, meaning)))
    listed = found if isinstance(found, list) else []
    if len(listed) < layers or any(not isinstance(x, int | str) or x not in meaning for x in listed[:layers]):
        raise ConfigError(f"{field} must say {known} for each of {layers} layers, got {found!r}")
    return tuple(meaning[x] for x in listed[:layers])


def rope_theta(config: Config) -> float:
    """The base of rotary positions, in the config's old or new place."""
    parameters = config.get("rope_parameters")
    found = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(found or config.get("rope_theta") or 10000.0)


def partial_rotary(config: Config) -> float:
    """The share of a head's dimensions that rotary positions turn."""
    parameters = config.get("rope_parameters")
    found = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return float(found or config.get("partial_rotary_factor") or 1.0)


def rope_scaling(config: Config) -> dict[str, Any]:
    """The scaling section of rotary positions; empty where there is none."""
    for field in ("rope_scaling", "rope_parameters"):
        section = config.get(field)
        if isinstance(section, dict) and section.get("rope_type", section.get("type", "default")) != "default":
            return dict(section)
    return {}
