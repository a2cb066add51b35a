"""GLM-5.3-Flash's language model: hyper-connections, Kimi delta attention, sparse latent attention without positions.

MTP is stored as in DeepSeek-V3, with latent attention and experts, and without hyper-connections. In Megatron's hybrid
model a layer is two: attention, and MLP or experts.
Names: transformers `modeling_glm5_next.py` and its conversion; the released checkpoint, as vLLM reads it; mcore-bridge
1.6 and Megatron-LM's development branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, depth_field, flags, number, optional
from mtp_convert.adapters.blocks.table import block_of, table
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.rules import Block, Copy, Placed

LINEAR = {
    "linear_attention": True,
    "deepseek_sparse_attention": False,
    "indexed_attention": False,
    "full_attention": False,
}
FULL_EVERY = 4  # where the config does not say which layers have linear attention
FIRST_SPARSE = 3  # where the config does not say which layers have experts
SUBLAYERS = ("attn", "ffn")  # in Megatron, layers of their own
HF_LAYER = "{trunk}layers.{layer}."
NATIVE_LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "{wrapper}decoder.layers.{i}."
MEGATRON_DEPTH = "{wrapper}mtp.layers.{k}."

# P pool   Y indexer head dim   H hidden
POOL = table(
    "hf native megatron",
    """
    ape   P,Y  index_kpool_compress_ape   =  index_kpool_compress_ape
    gate  Y,H  index_kpool_compress_gate  =  index_kpool_compress_gate
    """,
    hf="self_attn.indexer.",
    megatron="self_attention.core_attention.indexer.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    linear, sparse: per decoder layer, whether its attention is Kimi delta attention, and its MLP a mixture of experts.
    pool: keys that an indexer compresses into one.
    """

    H: int
    V: int
    streams: int
    linear: tuple[bool, ...]
    sparse: tuple[bool, ...]
    depths: int
    tied: bool
    mla: b.Mla
    pool: int
    kda: b.Kda
    mlp: b.Mlp
    moe: b.Moe


def dims(config: Config, depths: int) -> Dims:
    """Read the section of a config.json that describes the language model."""
    if config.get("qk_rope_head_dim"):
        raise ConfigError(f"qk_rope_head_dim must be 0, got {config['qk_rope_head_dim']!r}")
    sparse = gpt.sparse_layers(config, FIRST_SPARSE)
    shared = flags(config, "indexer_types", len(sparse), {"shared": True, "full": False})
    if any(shared or ()) or optional(config, "index_topk_freq", MOST) > 1:
        raise ConfigError("indexer_types: no released model of this class shares indexers")
    H = number(config, "hidden_size")
    linear = flags(config, "layer_types", len(sparse), LINEAR)
    return Dims(
        H=H,
        V=number(config, "vocab_size"),
        streams=number(config, "hc_mult", MOST),
        linear=linear or tuple((i + 1) % FULL_EVERY != 0 for i in range(len(sparse))),
        sparse=sparse,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        mla=gpt.mla(config),
        pool=number(config, "index_kpool", MOST),
        kda=kimi_delta(config, H),
        mlp=b.Mlp(H, number(config, "intermediate_size"), gated=True),
        moe=gpt.experts(config),
    )


def kimi_delta(config: Config, H: int) -> b.Kda:
    """Linear attention: a section of the config, or fields of their own; gates have the rank of a head."""
    section = config.get("linear_attn_config") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"linear_attn_config must be an object, got {section!r}")
    fields = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim"}
    fields["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    sizes = {field: section.get(own, config.get(field)) for field, own in fields.items()}
    heads, head, width = (number(sizes, field) for field in fields)
    return b.Kda(H, heads, head, width, R=head)


def attention(d: Dims) -> Block:
    """Sparse latent attention, whose indexer compresses keys."""
    assert d.mla.indexer is not None
    return b.joined(b.deepseek_mla(d.mla), block_of(POOL, {"P": d.pool, "Y": d.mla.indexer.Y, "H": d.H}))


def decoder(d: Dims) -> Iterator[Placed]:
    """Both halves of every layer, each with its hyper-connection."""
    attentions = {True: b.kimi_kda(d.kda), False: attention(d)}
    mlps = {True: b.llama_moe(d.moe), False: b.llama_mlp(d.mlp)}
    streams = [
        b.hyper_connection(d.H, d.streams, hf=f"hc_{name}", tree=f"{name}_hc", megatron="hyper_connection")
        for name in SUBLAYERS
    ]
    prefixes = {"hf": HF_LAYER, "native": NATIVE_LAYER, "megatron": MEGATRON_LAYER}
    inner = {**prefixes, "megatron": f"{MEGATRON_LAYER}inner_layer."}
    for layer, (linear, sparse) in enumerate(zip(d.linear, d.sparse, strict=True)):
        for half, (role, block) in enumerate((("attention", attentions[linear]), ("mlp", mlps[sparse]))):
            at = {"i": 2 * layer + half, "layer": layer}
            yield Placed(block, f"layers.{{layer}}.{role}.", inner, at)
            yield Placed(streams[half], f"layers.{{layer}}.{role}_streams.", prefixes, at)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    yield Placed(b.ends(d.H, d.V, tied=d.tied), "", {"hf": "", "native": "", "megatron": "{wrapper}"})
    yield from decoder(d)
    copies = (
        Copy("embed_tokens.weight", "embedding"),
        Copy("shared_head.head.weight", "embedding" if d.tied else "head"),
    )
    outside = b.with_copies(b.joined(b.hf_fusion(d.H), b.mtp_final_norm(d.H, "shared_head.norm")), *copies)
    depth = {"hf": HF_LAYER, "native": b.NATIVE.fusion, "megatron": MEGATRON_DEPTH}
    for k in range(d.depths):
        at = {"k": k, "layer": len(d.sparse) + k}
        yield Placed(outside, "mtp.{k}.", depth, at)
        for half, (role, block) in enumerate((("attention", attention(d)), ("mlp", b.llama_moe(d.moe)))):
            inner = {**depth, "megatron": f"{MEGATRON_DEPTH}{{inner}}.layers.{half}."}
            yield Placed(block, f"mtp.{{k}}.{role}.", inner, at)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Argument names of the development branch; a layer is two."""
    d = dims(config, 0)
    letters = ((("D", "K")[linear], ("-", "E")[sparse]) for linear, sparse in zip(d.linear, d.sparse, strict=True))
    pattern = "".join(letter for pair in letters for letter in pair)
    return {
        **args.model_args(config, layers=len(pattern), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args(config),
        **args.mla_args(config, d.mla),
        **args.moe_args(config, d.moe),
        **args.mtp_args(steps, "DE", repeated=repeated),
        "position_embedding_type": "none",
        "use_rotary_position_embeddings": False,
        "hybrid_layer_pattern": "/".join([pattern, *["DE"] * steps]),
        "is_hybrid_model": True,
        "activation_func_clamp_value": config.get("swiglu_limit") or None,
        "dsa_indexer_kpool": d.pool,
        "dsa_indexer_rotate_activation": False,
        "kda_two_stage_gates": True,
        "linear_num_key_heads": d.kda.Q,
        "linear_num_value_heads": d.kda.Q,
        "linear_key_head_dim": d.kda.D,
        "linear_value_head_dim": d.kda.D,
        "linear_conv_kernel_dim": d.kda.W,
        "enable_hyper_connections": True,
        "num_residual_streams": d.streams,
    }


FAMILY = Family(
    name="glm5_next",
    model_types=("glm5_next_text",),
    title="GLM-5.3-Flash's language model (hyper-connections, linear and latent attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {"trunk": ("model.", "model.language_model."), "experts": ("split", "stacked")},
        "megatron": b.megatron_words(
            "wrapper", "inner", "mlp_norm", "moe_norm", "q_norm", "kv_norm", "final_norm", final_norm="final_norm"
        ),
        "native": {},
    },
    depths=depth_field("num_nextn_predict_layers"),
    megatron_args=megatron_args,
    megatron_words=lambda _: gpt.APART,
    nested={"trunk": "model.language_model."},
    wrappers=("glm5_next",),
    megatron_since=(0, 17),
    unproven="Megatron-Core 0.19 has neither these hyper-connections nor this linear attention",
    notes=(
        "Megatron-Core 0.19 has no such model: names are those that mcore-bridge gives it on the development branch. "
        "Megatron-Bridge's own, newer model splits eh_proj in two and gives MTP layers hyper-connections, which no "
        "release has; such checkpoints are not read.",
        "Layer l is decoder.layers.{2l} (attention) and {2l + 1} (MLP or experts).",
        gpt.TOWER,
        gpt.COLUMNS,
        gpt.COPIES,
        "Hyper-connections, router bias, convolutions, A_log and dt_bias keep their stored dtype under --dtype.",
    ),
)
