"""GLM-5 / 5.1 / 5.2: latent attention with an indexer, which some layers share.

In GLM-5.2 a layer may use the keys that the indexer of a layer before it chose, and has none of its own; MTP layers
always have one. MTP is stored as in DeepSeek-V3.
Names: transformers `modeling_glm_moe_dsa.py`; Megatron-Bridge 0.6 `GLM5Bridge`; Megatron-Core 0.19 sparse attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, flags, number, optional
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.rules import Placed, Words

FIRST_SPARSE = 3  # where the config does not say which layers have experts
SHARED = {"shared": True, "full": False, "S": True, "F": False}
OWN = 2  # where the config does not say how many of the first layers have an indexer of their own


@dataclass(frozen=True, slots=True)
class Attention:
    """Latent attention with an indexer; `shared`: per decoder layer, whether it uses that of a layer before it."""

    full: b.Mla
    shared: tuple[bool, ...]


Dims = gpt.Dims[Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    mla = gpt.mla(config)
    if mla.indexer is None:
        raise ConfigError("index_n_heads: every model of this class has an indexer")
    sparse = gpt.sparse_layers(config, FIRST_SPARSE)
    attention = Attention(mla, shared_layers(config, len(sparse)))
    return gpt.dims(config, depths, attention=attention, sparse=sparse, moe=gpt.experts(config))


def shared_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Which layers have no indexer: a list or a pattern says so, or every `index_topk_freq`-th layer has one."""
    for field in ("indexer_types", "index_topk_pattern"):
        listed = config.get(field)
        pattern = {field: list(listed) if isinstance(listed, str) else listed}
        if (found := flags(pattern, field, layers, SHARED)) is not None:
            break
    else:
        own = number(config, "index_skip_topk_offset", MOST) if config.get("index_skip_topk_offset") else OWN
        found = regular(optional(config, "index_topk_freq", MOST) or 1, own, layers)
    if found != regular(*rule_of(found), layers):
        raise ConfigError(f"{field}: Megatron-Core shares indexers at regular distances only, got {listed!r}")
    return found


def regular(every: int, own: int, layers: int) -> tuple[bool, ...]:
    """Megatron-Core's rule: the first `own` layers have an indexer, and behind them each `every`-th one."""
    return tuple(max(i + 1 - own, 0) % every != 0 for i in range(layers))


def rule_of(shared: tuple[bool, ...]) -> tuple[int, int]:
    """The `every` and `own` that the layers follow, if they follow any."""
    if not any(shared):
        return 1, 1
    own = max(shared.index(True), 1)
    behind = shared[own:]
    return (behind.index(False) if False in behind else len(behind)) + 1, own


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    full = b.deepseek_mla(d.attention.full)
    shared = b.deepseek_mla(replace(d.attention.full, indexer=None, shares_indexer=True))
    attentions = [shared if s else full for s in d.attention.shared]
    yield from gpt.places(d, full, b.llama_moe(d.moe) if d.moe else None, attentions=attentions)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    found = gpt.megatron_args(config, d, steps, repeated=repeated, attention=args.mla_args(config, d.attention.full))
    every, own = rule_of(d.attention.shared)
    shared = {"dsa_indexer_topk_freq": every, "dsa_indexer_skip_topk_offset": own} if every > 1 else {}
    return {
        **found,
        "dsa_indexer_rope_interleaved": bool(config.get("indexer_rope_interleave", True)),
        "dsa_indexer_rotate_activation": False,
        "dsa_indexer_k_norm_epsilon": 1e-6,
        **shared,
    }


def megatron_words(d: Dims) -> Words:
    """Sparse attention keeps the norms of both ranks apart."""
    return {**gpt.megatron_words(d), **gpt.APART}


FAMILY = Family(
    name="glm_moe_dsa",
    model_types=("glm_moe_dsa",),
    title="GLM-5 / 5.1 / 5.2 (sparse latent attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.LATENT_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.MLA_PROVIDER,
    megatron_since=(0, 16),
    released=Released((1,), ("bf16", "fp8")),
    notes=(
        gpt.COLUMNS,
        gpt.LATENT,
        gpt.COPIES,
        "Layers that share an indexer have none; MTP layers always have one.",
        "Megatron-Bridge builds GLM-5 without MTP unless mtp_num_layers is set by hand.",
        gpt.KEPT_BIAS,
    ),
)
