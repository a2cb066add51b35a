"""LongCat-Flash: layers of two attentions and two dense MLPs, with a mixture of experts beside them; a dense MTP layer.

A layer's experts read what its first MLP reads, and join behind the second one. Megatron has no such model: here every
half is a decoder layer of latent attention with a dense MLP, and the experts are a part of the first half.
Names: the released checkpoint, as vLLM and SGLang read it; transformers `modeling_longcat_flash.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, number, optional, silent_depth_field
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.rules import Block, Copy, Placed

HF_LAYER = "{trunk}layers.{pair}."
NATIVE_LAYER = "model.layers.{pair}."
MEGATRON_LAYER = "{wrapper}decoder.layers.{i}."


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes; a pair is what the release calls a layer."""

    H: int
    V: int
    pairs: int
    depths: int
    tied: bool
    mla: b.Mla
    mlp: b.Mlp
    moe: b.Moe


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    if config.get("router_bias"):
        raise ConfigError("router_bias: Megatron's router adds a bias to the scores for the choice alone")
    H, mla = number(config, "hidden_size"), gpt.mla(config)
    if mla.A is None:
        raise ConfigError("q_lora_rank: every model of this class has one")
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        pairs=number(config, "num_layers", MOST),
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        mla=mla,
        mlp=b.Mlp(H, number(config, "ffn_hidden_size"), gated=True),
        moe=b.Moe(
            H,
            E=number(config, "n_routed_experts", MOST),
            I=number(config, "expert_ffn_hidden_size"),
            S=0,
            gated=True,
            zero=optional(config, "zero_expert_num", MOST),
            normed=False,
            wide_router=True,
        ),
    )


def shortcut(d: b.Moe) -> Block:
    """The experts; in Megatron's names, beside the MLP of the first half."""
    block = b.llama_moe(d, router="router.classifier", bias="router.e_score_correction_bias")
    return b.respelled(block, "megatron", ("mlp.", "shortcut_mlp."))


def decoder(d: Dims) -> Iterator[Placed]:
    """Both halves of every pair, and its experts."""
    prefixes = {"hf": HF_LAYER, "native": NATIVE_LAYER, "megatron": MEGATRON_LAYER}
    experts = shortcut(d.moe)
    halves = [
        {
            "attention": b.deepseek_mla(d.mla, f"input_layernorm.{half}", f"self_attn.{half}"),
            "mlp": b.llama_mlp(d.mlp, f"post_attention_layernorm.{half}", f"mlps.{half}"),
        }
        for half in (0, 1)
    ]
    for pair in range(d.pairs):
        for half, blocks in enumerate(halves):
            for role, block in blocks.items():
                yield Placed(block, f"layers.{{i}}.{role}.", prefixes, {"i": 2 * pair + half, "pair": pair})
        yield Placed(experts, "layers.{i}.experts.", prefixes, {"i": 2 * pair, "pair": pair})


def depth(d: Dims) -> b.Depth:
    """A dense MTP layer, with a copy of the main embedding."""
    mlp = b.respelled(b.llama_mlp(d.mlp), "hf", ("mlp.", "transformer_layer.mlp."))
    norm = b.with_copies(b.mtp_final_norm(d.H, "norm"), Copy("embed_tokens.weight", "embedding"))
    return b.Depth(b.hf_fusion(d.H, "enorm.m", "hnorm.m"), {"attention": b.deepseek_mla(d.mla), "mlp": mlp}, norm)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    at = "{trunk}mtp.layers.{k}."
    hf = b.HfPrefixes(fusion=at, inner=at, final="{trunk}mtp." if d.depths <= 1 else at)
    ends, *mtp = b.places(b.ends(d.H, d.V, tied=d.tied), [], depth(d), depths=d.depths, hf=hf)
    yield ends
    yield from decoder(d)
    yield from mtp


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return {
        **args.model_args(config, layers=2 * d.pairs, H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.mla_args(config, d.mla),
        **args.moe_args({**config, "num_experts_per_tok": config.get("moe_topk")}, d.moe, score="softmax"),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "ffn_hidden_size": d.mlp.F,
    }


FAMILY = Family(
    name="longcat_flash",
    model_types=("longcat_flash",),
    title="LongCat-Flash (latent attention, shortcut MoE)",
    dims=dims,
    places=places,
    choices=b.choices("wrapper", "mlp_norm", "q_norm", "kv_norm", "final_norm", experts=b.EXPERTS),
    depths=silent_depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    foreign={
        "index_topk": "LongCat with sparse attention",
        "nextn_use_scmoe": "an MTP layer with experts",
        "ngram_vocab_size_ratio": "LongCat with n-gram embeddings",
        "oe_vocab_size_ratio": "LongCat with n-gram embeddings",
    },
    megatron_since=(0, 12),
    released=Released((1,), ("bf16", "fp8")),
    unproven="Megatron-Core has no layers of two attentions with experts beside them",
    notes=(
        "Megatron has no such model: half h of layer p is named decoder.layers.{2p + h}, its experts are "
        "decoder.layers.{2p}.shortcut_mlp.",
        "The released names have room for one MTP depth, whose norm is model.mtp.norm; with several, every one has it.",
        "model.mtp.embed_tokens is a copy of the main embedding; the head is the main model's.",
        "transformers 5.23 counts zero experts among the stacked ones, and therefore refuses the release; they have "
        "no weights, and none are stored here.",
        gpt.COLUMNS,
        gpt.LATENT,
        gpt.KEPT_ROUTER,
    ),
)
