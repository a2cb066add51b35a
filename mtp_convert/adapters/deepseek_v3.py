"""DeepSeek-V3 / R1 / V3.1, V3.2 with its indexer, and models of the same class without MTP (Kimi-K2, Moonlight).

Hugging Face stores MTP depth k as one more decoder layer, N + k, with enorm, hnorm, eh_proj, the final norm under
`shared_head`, and copies of the main embedding and head. Names: transformers `modeling_deepseek_v3.py` and the released
checkpoints; Megatron-Core 0.19 `GPTModel` with latent attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, number, optional
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Block, Copy, Placed, Words


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes; `dense` layers come before the mixtures of experts."""

    H: int
    V: int
    layers: int
    dense: int
    depths: int
    tied: bool
    mla: b.Mla
    mlp: b.Mlp
    moe: b.Moe | None


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    H, layers = number(config, "hidden_size"), number(config, "num_hidden_layers", MOST)
    dense = optional(config, "first_k_dense_replace", MOST) if config.get("n_routed_experts") else layers
    if depths and dense >= layers:
        raise ConfigError("an MTP depth is a mixture of experts, but no decoder layer is one")
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        layers=layers,
        dense=min(dense, layers),
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        mla=mla(config, H),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=moe(config, H) if dense < layers else None,
    )


def mla(config: Config, H: int) -> b.Mla:
    """Latent attention, with an indexer where the config has one."""
    if config.get("attention_bias"):
        raise ConfigError("attention_bias: Megatron's latent attention has no bias")
    indexer = None
    if config.get("index_n_heads"):
        indexer = b.Indexer(number(config, "index_n_heads"), number(config, "index_head_dim"))
    return b.Mla(
        H,
        Q=number(config, "num_attention_heads"),
        N=number(config, "qk_nope_head_dim"),
        R=number(config, "qk_rope_head_dim"),
        V=number(config, "v_head_dim"),
        A=optional(config, "q_lora_rank") or None,
        B=number(config, "kv_lora_rank"),
        indexer=indexer,
    )


def moe(config: Config, H: int) -> b.Moe:
    """Gated experts; shared experts are one wide expert."""
    inner = number(config, "moe_intermediate_size")
    return b.Moe(
        H,
        E=number(config, "n_routed_experts", MOST),
        I=inner,
        S=inner * optional(config, "n_shared_experts", MOST),
        gated=True,
    )


def decoder(d: Dims) -> list[b.Layer]:
    """The blocks of every decoder layer."""
    attention = b.deepseek_mla(d.mla)
    dense = {"attention": attention, "mlp": b.llama_mlp(d.mlp)}
    experts = {"attention": attention, "mlp": b.llama_moe(d.moe)} if d.moe else dense
    return [dense if i < d.dense else experts for i in range(d.layers)]


def depth(d: Dims, layer: b.Layer) -> b.Depth:
    """An MTP depth; the copies are written where the source had them."""
    fusion, final = b.hf_fusion(d.H), b.mtp_final_norm(d.H, "shared_head.norm")
    return b.Depth(
        with_copies(fusion, Copy("embed_tokens.weight", "embedding")),
        layer,
        with_copies(final, Copy("shared_head.head.weight", "embedding" if d.tied else "head")),
    )


def with_copies(block: Block, *copies: Copy) -> Block:
    """The block with Hugging Face tensors that repeat params of other places."""
    return Block(block.params, {**block.rows, "hf": (*block.rows["hf"], *copies)}, block.domains)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    layers = decoder(d)
    ends = b.ends(d.H, d.V, tied=d.tied)
    yield from b.places(ends, layers, depth(d, layers[-1]), depths=d.depths, hf=b.HfPrefixes())


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    found = {
        **args.model_args(config, layers=d.layers, H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.mla_args(config, d.mla),
        **args.moe_args(config, d.moe),
        **args.gpt_mtp_args(steps, repeated=repeated),
    }
    return {**found, "moe_layer_freq": [int(i >= d.dense) for i in range(d.layers)]} if d.moe else found


def megatron_words(d: Dims) -> Words:
    """Sparse attention keeps the norms of both ranks apart."""
    sparse = {"q_norm": "q_layernorm.weight", "kv_norm": "kv_layernorm.weight"} if d.mla.indexer else {}
    return {"decoder": "stacked" if d.moe is None else "per_layer", **sparse}


FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "deepseek_v32", "kimi_k2"),
    title="DeepSeek-V3 / R1 / V3.1 / V3.2, Kimi-K2 (latent attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {"trunk": b.TRUNKS, "experts": ("split", "stacked")},
        "megatron": b.megatron_words(
            "wrapper",
            "decoder",
            "mlp_norm",
            "moe_norm",
            "q_norm",
            "kv_norm",
            "final_norm",
            inner="transformer_layer",
        ),
        "native": {},
    },
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=megatron_words,
    forms=b.MEGATRON_FORMS,
    bridge_provider="megatron.bridge.models.mla_provider.MLAModelProvider",
    megatron_since=(0, 12),
    notes=(
        "eh_proj columns are [embedding | hidden]; rows of a query head are [without rope; with rope].",
        "embed_tokens and shared_head.head of an MTP layer are copies of the main embedding and head.",
        "The router bias keeps its stored dtype under --dtype.",
    ),
)
