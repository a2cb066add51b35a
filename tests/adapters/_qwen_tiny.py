"""The tiny configs of the families with Qwen's MTP."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from _kit import FIXTURES

from mtp_convert.adapters import families
from mtp_convert.mapping.family import Family

Config = dict[str, Any]
NAMES = ("qwen3", "qwen3_next", "qwen3_5", "qwen3_5 dense", "mellum", "exaone_moe", "exaone4_5")
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@cache
def stored_config(name: str) -> str:
    return (FIXTURES / "configs" / f"{name}.json").read_text()


def tiny(name: str, **changed: object) -> Config:
    """The tiny config of a family; "dense" is the one without experts, and with a tied head."""
    stem, _, dense = name.partition(" ")
    config: Config = json.loads(stored_config(stem))
    if dense:
        config = {k: v for k, v in config.items() if k not in EXPERTS}
        config |= {"model_type": "qwen3_5_text", "intermediate_size": 24, "tie_word_embeddings": True}
    return {k: v for k, v in {**config, **changed}.items() if v is not None}


def family(name: str) -> Family:
    return next(f for f in families() if f.name == name.partition(" ")[0])
