"""What the families with Qwen's MTP have in common: layers of several kinds, and one depth below a top-level `mtp.`.

A release stores one MTP depth, whose projection and norms have no index: `mtp.fc`, `mtp.pre_fc_norm_embedding`,
`mtp.pre_fc_norm_hidden`, `mtp.norm`, and the decoder layer `mtp.layers.0`. Megatron can train several depths; these get
names of ours, `mtp.layers.{k}.enorm` and so on, which no other tool reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, flags, number, optional
from mtp_convert.adapters._gpt import gqa
from mtp_convert.mapping.family import Choices, Config, ConfigError
from mtp_convert.mapping.rules import Block, Placed, Words

SEVERAL = "The released names have room for one MTP depth; several are stored as mtp.layers.{k}.*, names of our own."
COLUMNS = "mtp.fc columns are [embedding | hidden]; embedding and head are the main model's, without copies."
DELTA_NORM = (
    "Megatron counts the weight of a delta net's output norm from 0, Hugging Face from 1: it is shifted, and 16-bit "
    "weights become float32 by that, so that nothing is lost."
)
NESTED = {"trunk": "model.language_model."}  # below a vision-language model, but for MTP and the head


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    linear, sparse: per decoder layer, whether its attention is a delta net, and its MLP a mixture of experts.
    mtp_sparse: the same of the MTP layer's MLP; its attention is never a delta net.
    """

    H: int
    V: int
    linear: tuple[bool, ...]
    sparse: tuple[bool, ...]
    mtp_sparse: bool
    depths: int
    tied: bool
    attention: b.Attention
    delta: b.DeltaNet | None
    mlp: b.Mlp | None
    moe: b.Moe | None


@dataclass(frozen=True, slots=True)
class Kinds:
    """The blocks of a family; those that no layer has may be absent. `mtp_moe`: where it is not named as `moe`."""

    attention: Block
    mlp: Block | None
    moe: Block | None = None
    delta: Block | None = None
    mtp_moe: Block | None = None

    def layer(self, *, linear: bool, sparse: bool, mtp: bool = False) -> b.Layer:
        """The blocks of a decoder layer, or of an MTP layer."""
        attention = self.delta if linear else self.attention
        mlp = ((self.mtp_moe if mtp else None) or self.moe) if sparse else self.mlp
        assert attention is not None
        assert mlp is not None
        return {"attention": attention, "mlp": mlp}


def dims(
    config: Config,
    depths: int,
    *,
    attention: b.Attention,
    sparse: tuple[bool, ...],
    mtp_sparse: bool,
    linear: tuple[bool, ...] = (),
    moe: b.Moe | None = None,
) -> Dims:
    """Put the sizes together; the blocks that no layer has are left out."""
    H = attention.H
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        linear=linear or (False,) * len(sparse),
        sparse=sparse,
        mtp_sparse=mtp_sparse,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=attention,
        delta=delta_net(config, H) if any(linear) else None,
        mlp=None if all((*sparse, mtp_sparse)) else mlp(config, H, post_norm=attention.post_norm),
        moe=moe,
    )


def attention(config: Config, *, gated: bool = False, post_norm: bool = False) -> b.Attention:
    """Grouped-query attention with norms of queries and keys."""
    if config.get("attention_bias"):
        raise ConfigError("attention_bias: Megatron has no bias of the output projection alone")
    return replace(gqa(config, qk_norm=True), gated=gated, post_norm=post_norm)


def mlp(config: Config, H: int, *, post_norm: bool = False) -> b.Mlp:
    """Dense gated MLP."""
    return b.Mlp(H, number(config, "intermediate_size"), gated=True, post_norm=post_norm)


def delta_net(config: Config, H: int) -> b.DeltaNet:
    """The linear attention."""
    K, V = number(config, "linear_num_key_heads"), number(config, "linear_num_value_heads")
    if V % K:
        raise ConfigError(f"linear_num_value_heads {V} is no multiple of linear_num_key_heads {K}")
    return b.DeltaNet(
        H,
        K,
        V,
        D=number(config, "linear_key_head_dim"),
        E=number(config, "linear_value_head_dim"),
        W=number(config, "linear_conv_kernel_dim"),
    )


def gated_moe(config: Config, H: int) -> b.Moe:
    """Experts with a gated shared expert."""
    return b.Moe(
        H,
        E=number(config, "num_experts", MOST),
        I=number(config, "moe_intermediate_size"),
        S=number(config, "shared_expert_intermediate_size"),
        gated=True,
        router_bias=False,
        shared_gate=True,
    )


def linear_layers(config: Config, *others: str) -> tuple[bool, ...]:
    """Which layers are delta nets; without a list, all but every fourth, or as `full_attention_interval` says.

    others: what the list may call the other layers, beside full attention.
    """
    layers = number(config, "num_hidden_layers", MOST)
    kinds = {"linear_attention": True, **dict.fromkeys(("full_attention", *others), False)}
    if (found := flags(config, "layer_types", layers, kinds)) is not None:
        return found
    interval = optional(config, "full_attention_interval", MOST) or 4
    return tuple(bool((i + 1) % interval) for i in range(layers))


def sliding_layers(config: Config) -> tuple[bool, ...]:
    """Which layers attend to a window; without a list, all but every n-th, as `sliding_window_pattern` says."""
    layers = number(config, "num_hidden_layers", MOST)
    found = flags(config, "layer_types", layers, {"sliding_attention": True, "full_attention": False})
    if found is not None:
        return found
    interval = optional(config, "sliding_window_pattern", MOST)
    return tuple(bool(interval and (i + 1) % interval) for i in range(layers))


def gated_kinds(d: Dims, *, by_head: bool) -> Kinds:
    """The blocks of Qwen3-Next and Qwen3.5; experts of the MTP layer may be spelled otherwise than the others."""

    def experts(word: str) -> Block | None:
        return b.llama_moe(d.moe, shared="shared_expert", word=word) if d.moe else None

    return Kinds(
        attention=b.llama_attention(d.attention),
        mlp=b.llama_mlp(d.mlp) if d.mlp else None,
        moe=experts("experts"),
        delta=b.qwen_delta_net(d.delta, by_head=by_head) if d.delta else None,
        mtp_moe=experts("mtp_experts"),
    )


def gated_choices(experts: tuple[str, str]) -> dict[str, Choices]:
    """The spellings of Qwen3-Next and Qwen3.5; `experts` outside of MTP, the released spelling first."""
    norms = ("attention_norm", "delta_norm", "mlp_norm", "moe_norm", "final_norm")
    return b.choices("wrapper", "decoder", *norms, experts=experts, mtp_experts=b.EXPERTS)


def places(d: Dims, kinds: Kinds) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    layers = [kinds.layer(linear=x, sparse=y) for x, y in zip(d.linear, d.sparse, strict=True)]
    inner = "mtp.layers.{k}."
    if d.depths > 1:
        fusion, final, at = b.hf_fusion(d.H), b.mtp_final_norm(d.H), inner
    else:
        fusion = b.hf_fusion(d.H, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc")
        final, at = b.mtp_final_norm(d.H, "norm"), "mtp."
    depth = b.Depth(fusion, kinds.layer(linear=False, sparse=d.mtp_sparse, mtp=True), final) if d.depths else None
    hf = b.HfPrefixes(fusion=at, inner=inner, final=at)
    yield from b.places(b.ends(d.H, d.V, tied=d.tied), layers, depth, depths=d.depths, hf=hf)


def megatron_args(config: Config, d: Dims, steps: int, *, repeated: bool, score: str = "softmax") -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    found = {
        **args.model_args(config, layers=len(d.sparse), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.attention_args(d.attention),
        **args.delta_args(d.delta, d.linear),
        **args.moe_args(config, d.moe, score=score),
        **args.gpt_mtp_args(steps, repeated=repeated),
    }
    if d.moe is not None:
        found["moe_layer_freq"] = 1 if all(d.sparse) else [int(s) for s in d.sparse]
        found["moe_router_pre_softmax"] = score == "softmax" and not config.get("norm_topk_prob", True)
    return found


def gated_args(config: Config, d: Dims, steps: int, *, repeated: bool) -> dict[str, Any]:
    """The same of Qwen3-Next and Qwen3.5, whose norms count from 0 and whose rotary positions turn a quarter."""
    found = megatron_args({"partial_rotary_factor": 0.25, **config}, d, steps, repeated=repeated)
    return {**found, "apply_layernorm_1p": True}


def megatron_words(d: Dims) -> Words:
    """Layers that are all alike are stored stacked."""
    return {"decoder": "per_layer" if any(d.linear) or len(set(d.sparse)) > 1 else "stacked"}
