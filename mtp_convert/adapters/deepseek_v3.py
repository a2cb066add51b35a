"""DeepSeek-V3 / R1 / V3.1, V3.2 with its indexer, and models of the same class without MTP (Kimi-K2, Moonlight).

Hugging Face stores MTP depth k as one more decoder layer, N + k, with enorm, hnorm, eh_proj, the final norm under
`shared_head`, and copies of the main embedding and head. Names: transformers `modeling_deepseek_v3.py` and the released
checkpoints; Megatron-Core 0.19 `GPTModel` with latent attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number
from mtp_convert.mapping.family import Config, Family, Released
from mtp_convert.mapping.rules import Placed, Words

Dims = gpt.Dims[b.Mla]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json; without routed experts, all layers are dense."""
    routed = bool(config.get("n_routed_experts"))
    sparse = gpt.sparse_layers(config) if routed else (False,) * number(config, "num_hidden_layers", MOST)
    moe = gpt.experts(config) if any(sparse) else None
    return gpt.dims(config, depths, attention=gpt.mla(config), sparse=sparse, moe=moe)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield from gpt.places(d, b.deepseek_mla(d.attention), b.llama_moe(d.moe) if d.moe else None)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return gpt.megatron_args(config, d, steps, repeated=repeated, attention=args.mla_args(config, d.attention))


def megatron_words(d: Dims) -> Words:
    """Sparse attention keeps the norms of both ranks apart."""
    return {**gpt.megatron_words(d), **(gpt.APART if d.attention.indexer else {})}


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "deepseek_v32", "kimi_k2"),
    title="DeepSeek-V3 / R1 / V3.1 / V3.2, Kimi-K2 (latent attention, MoE)",
    dims=dims,
    places=places,
    choices=b.choices(*b.LATENT_WORDS, experts=b.EXPERTS),
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider=gpt.MLA_PROVIDER,
    megatron_since=(0, 12),
    released=Released((0, 1), ("fp8",)),
    notes=(
        gpt.COLUMNS,
        gpt.LATENT,
        gpt.COPIES,
        gpt.KEPT_BIAS,
        "Without q_lora_rank (Moonlight) there is no norm of queries, but Megatron-Core 0.19 puts one into "
        "linear_q_proj and does not load the checkpoint; older releases do.",
    ),
)
