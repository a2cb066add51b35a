"""The registry: which module knows which `model_type`. Modules are imported on demand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.family import Family

MODULES: tuple[str, ...] = (
    "nemotron_h",
    "deepseek_v3",
    "deepseek_v4",
    "qwen3",
    "qwen3_next",
    "qwen3_5",
    "mellum",
    "exaone_moe",
    "exaone4_5",
    "qwen4_exp",
    "mimo",
    "mimo_v2_flash",
    "step3p5",
    "ernie4_5_moe",
    "inkling",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "longcat_flash",
    "bailing_moe",
    "bailing_hybrid",
    "hy_v3",
    "minimax_m3",
    "glm5_next",
)
# Multi-modal wrappers keep the language model's config in one of these fields.
NESTED = ("text_config", "llm_config", "language_config")


@cache
def families() -> tuple[Family, ...]:
    """Every family, in the order of the registry."""
    return tuple(import_module(f"mtp_convert.adapters.{m}").FAMILY for m in MODULES)


def find(config: Mapping[str, Any]) -> tuple[Family, tuple[str, ...]]:
    """The family of a config, and the path of fields to the section that describes the language model.

    Raises:
        ConvertError: MTP021, naming the known model types.
    """
    known = {t: f for f in families() for t in f.model_types}
    wrapping = {t: f for f in families() for t in f.wrappers}
    wrapped = wrapping.get(str(config.get("model_type")))
    if str(config.get("model_type")) in known:
        return known[str(config["model_type"])], ()
    for nested in NESTED:
        section = config.get(nested)
        if isinstance(section, dict) and (family := known.get(str(section.get("model_type")), wrapped)):
            return family, (nested,)
    raise ConvertError(
        "MTP021",
        Problem(
            "model_type",
            "config.json",
            repr(config.get("model_type")),
            f"one of {', '.join(sorted({*known, *wrapping}))}",
        ),
        hint="`mtp-convert families` lists what is supported",
    )


def decided(config: Mapping[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    """What the outermost config decides for the language model in its section, whatever the section says itself."""
    return {key: config[key] for key in ("tie_word_embeddings",) if section and key in config}
