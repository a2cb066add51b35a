"""What decoders have in common whose first layers are dense and the others mixtures of experts.

MTP depth k is one more decoder layer with experts, N + k: norms of embedding and hidden state, their projection, the
layer, and a norm behind it. Some releases store the main model's embedding and head once more beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, flags, number, optional
from mtp_convert.mapping.family import Config, ConfigError
from mtp_convert.mapping.rules import Block, Copy, Placed, Words

SPARSE = {"sparse": True, "dense": False}
PROVIDERS = "megatron.bridge.models"  # Megatron-Bridge 0.6
GPT_PROVIDER, MLA_PROVIDER = f"{PROVIDERS}.gpt_provider.GPTModelProvider", f"{PROVIDERS}.mla_provider.MLAModelProvider"
KEPT_BIAS = "The router bias keeps its stored dtype under --dtype."
KEPT_ROUTER = "The router's weight and bias keep their stored dtype under --dtype."
COLUMNS = "eh_proj columns are [embedding | hidden]."
COPIES = "embed_tokens and shared_head.head of an MTP layer are copies of the main embedding and head."
TOWER = "The vision tower is no part of the language model: it stays behind (--allow-unmapped)."
LATENT = "Rows of a query head are [without rope; with rope]."
APART = {"q_norm": "q_layernorm.weight", "kv_norm": "kv_layernorm.weight"}  # latent attention that is sparse

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Dims(Generic[A]):
    """Everything that fixes the names and shapes; `sparse`: per decoder layer, whether it has experts."""

    H: int
    V: int
    sparse: tuple[bool, ...]
    depths: int
    tied: bool
    attention: A
    mlp: b.Mlp
    moe: b.Moe | None


def dims(config: Config, depths: int, *, attention: A, sparse: tuple[bool, ...], moe: b.Moe | None) -> Dims[A]:
    """Put the sizes together."""
    if depths and not any(sparse):
        raise ConfigError("an MTP depth is a mixture of experts, but no decoder layer is one")
    H = number(config, "hidden_size")
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        sparse=sparse,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=attention,
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=moe if any(sparse) else None,
    )


def sparse_layers(config: Config, dense: int = 0) -> tuple[bool, ...]:
    """Which layers have experts: a list says so, or all but the first `first_k_dense_replace` (else `dense`) have."""
    layers = number(config, "num_hidden_layers", MOST)
    if (listed := flags(config, "mlp_layer_types", layers, SPARSE)) is not None:
        return listed
    if config.get("first_k_dense_replace") is not None:
        dense = optional(config, "first_k_dense_replace", MOST)
    return tuple(i >= dense for i in range(layers))


def gqa(config: Config, *, qkv_bias: bool = False, qk_norm: bool = False) -> b.Attention:
    """Grouped-query attention; biases, where there are any, belong to queries, keys and values."""
    H, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    groups = number(config, "num_key_value_heads")
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    return b.Attention(H, heads, groups, optional(config, "head_dim") or H // heads, qkv_bias=qkv_bias, qk_norm=qk_norm)


def mla(config: Config) -> b.Mla:
    """Latent attention, with an indexer where the config has one."""
    if config.get("attention_bias"):
        raise ConfigError("attention_bias: Megatron's latent attention has no bias")
    indexer = None
    if config.get("index_n_heads"):
        indexer = b.Indexer(number(config, "index_n_heads"), number(config, "index_head_dim"))
    return b.Mla(
        number(config, "hidden_size"),
        Q=number(config, "num_attention_heads"),
        N=number(config, "qk_nope_head_dim"),
        R=optional(config, "qk_rope_head_dim"),
        V=number(config, "v_head_dim"),
        A=optional(config, "q_lora_rank") or None,
        B=number(config, "kv_lora_rank"),
        indexer=indexer,
    )


def experts(
    config: Config, count: str = "n_routed_experts", shared: str = "n_shared_experts", width: str = ""
) -> b.Moe:
    """Gated experts; shared experts are one wide expert.

    Args:
        count, shared: the fields that count experts.
        width: the field with a shared expert's inner size, where it may differ from the others'.
    """
    inner = number(config, "moe_intermediate_size")
    return b.Moe(
        number(config, "hidden_size"),
        E=number(config, count, MOST),
        I=inner,
        S=(optional(config, width) or inner) * optional(config, shared, MOST),
        gated=True,
    )


def places(
    d: Dims[Any],
    attention: Block,
    moe: Block | None,
    *,
    attentions: Sequence[Block] = (),
    final: str = "shared_head.norm",
    copies: bool = True,
    ends: Block | None = None,
) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout.

    Args:
        attention: what every layer has, and the MTP layers.
        attentions: what the decoder layers have, where they differ.
        final: the Hugging Face name of the norm behind an MTP layer.
        copies: whether releases store embedding and head again beside an MTP layer; they are written where the source
            had them.
    """
    mlps = {False: b.llama_mlp(d.mlp), True: moe}
    layers: list[b.Layer] = []
    for own, sparse in zip(attentions or [attention] * len(d.sparse), d.sparse, strict=True):
        mlp = mlps[sparse]
        assert mlp is not None
        layers.append({"attention": own, "mlp": mlp})
    fusion, norm = b.hf_fusion(d.H), b.mtp_final_norm(d.H, final)
    if copies:
        fusion = b.with_copies(fusion, Copy("embed_tokens.weight", "embedding"))
        norm = b.with_copies(norm, Copy("shared_head.head.weight", "embedding" if d.tied else "head"))
    depth = b.Depth(fusion, {"attention": attention, "mlp": moe}, norm) if moe else None
    yield from b.places(ends or b.ends(d.H, d.V, tied=d.tied), layers, depth, depths=d.depths, hf=b.HfPrefixes())


def megatron_args(
    config: Config, d: Dims[Any], steps: int, *, repeated: bool, attention: dict[str, Any]
) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    found = {
        **args.model_args(config, layers=len(d.sparse), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **attention,
        **args.moe_args(config, d.moe),
        **args.gpt_mtp_args(steps, repeated=repeated),
    }
    return {**found, "moe_layer_freq": [int(s) for s in d.sparse]} if d.moe else found


def megatron_words(d: Dims[Any]) -> Words:
    """Megatron-Core stores the decoder layers stacked, unless `moe_layer_freq` lists them."""
    return {"decoder": "per_layer" if d.moe else "stacked"}
