"""Reading a config.json: numbers that are checked, the field that counts MTP depths, rope settings."""

from __future__ import annotations

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


def depth_field(name: str) -> DepthField:
    """The usual way to count MTP depths: one field, absent or 0 in models without MTP; it counts stored depths, so a
    repeated layer counts once."""

    def declared(config: Config) -> int:
        return optional(config, name, MOST)

    def corrected(config: Config, depths: int) -> dict[str, Any]:
        return {**config, name: depths}

    return DepthField(declared, corrected)


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
