"""What the settings of a model cannot be: missing, unknown, or at odds with another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtp_convert.models.megatron.hybrid_pattern import ATTENTION, COMPRESSED, GDN, MAMBA, MLA, MLP, MOE

if TYPE_CHECKING:
    from mtp_convert.models.megatron.config import TransformerConfig

# block -> the sizes that it cannot do without
_SIZES = {
    COMPRESSED: (
        "num_attention_heads",
        "q_lora_rank",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "o_groups",
        "o_lora_rank",
        "csa_window_size",
    ),
    ATTENTION: ("num_attention_heads", "num_query_groups", "kv_channels"),
    MLA: ("num_attention_heads", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    MLP: ("ffn_hidden_size",),
    MOE: ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
    GDN: (
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "transformer_impl": ("transformer_engine", "local"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation": ("silu", "gelu", "squared_relu"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "rope_type": ("rope", "yarn"),
    "experimental_attention_variant": (None, "gated_delta_net", "dsa", "dsv4_hybrid"),
    "moe_router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "recompute_granularity": (None, "full"),
}


def problems(config: TransformerConfig) -> Iterator[str]:
    """Everything that is wrong, a sentence each."""
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) not in choices:
            yield f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
    wrong = list(_wrong_frequencies(config))
    yield from wrong
    if not wrong:  # else it is not known which blocks there are
        yield from _wrong_blocks(config)
    yield from _wrong_counts(config)
    yield from _wrong_indexer(config)
    yield from _wrong_compression(config)
    yield from _wrong_experiments(config)


def _wrong_frequencies(config: TransformerConfig) -> Iterator[str]:
    for name in ("moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq", "no_rope_freq"):
        freq = getattr(config, name)
        if isinstance(freq, int) and freq < 1:
            yield f"{name} is {freq}, expected 1 or more"
        if isinstance(freq, tuple) and len(freq) != config.num_layers:
            yield f"{name} has {len(freq)} entries for {config.num_layers} layers"


def _wrong_blocks(config: TransformerConfig) -> Iterator[str]:
    needed = {"hidden_size", "vocab_size"}.union(*(_SIZES[block] for block in config.blocks))
    if missing := sorted(name for name in needed if not getattr(config, name)):
        yield f"sizes missing: {', '.join(missing)}"
    if MAMBA in config.blocks and config.megatron_version < (0, 19):
        yield f"Mamba mixers have other names before 0.19, megatron_version is {config.megatron_version}"
    if GDN in config.blocks and config.activation != "silu":
        yield f"linear attention needs activation 'silu', got {config.activation!r}"


def _wrong_counts(config: TransformerConfig) -> Iterator[str]:
    for whole, part in (
        ("num_attention_heads", "num_query_groups"),
        ("mamba_num_heads", "mamba_num_groups"),
        ("linear_num_value_heads", "linear_num_key_heads"),
        ("num_moe_experts", "moe_router_num_groups"),
    ):
        total, parts = getattr(config, whole), getattr(config, part)
        if parts and (total or 0) % parts:
            yield f"{whole} {total} is no multiple of {part} {parts}"
    if config.moe_router_num_groups and not config.moe_router_group_topk:
        yield "moe_router_num_groups needs moe_router_group_topk"
    if config.hybrid is not None:
        if len(config.hybrid.main) != config.num_layers:
            yield f"{len(config.hybrid.main)} layers in the pattern, num_layers is {config.num_layers}"
        depths = config.mtp_stored_layers if config.hybrid.mtp_depths == 1 else config.mtp_num_layers or 0
        if config.hybrid.mtp_depths != depths:
            yield f"{config.hybrid.mtp_depths} MTP depths in the pattern, mtp_num_layers is {config.mtp_num_layers}"


def _wrong_indexer(config: TransformerConfig) -> Iterator[str]:
    if not config.sparse_attention:
        return
    needed = ("q_lora_rank", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk")
    if missing := [name for name in needed if not getattr(config, name)]:
        yield f"sizes missing for sparse attention: {', '.join(missing)}"
    if config.dsa_indexer_topk_freq < 1:
        yield f"dsa_indexer_topk_freq is {config.dsa_indexer_topk_freq}, expected 1 or more"
    if not config.multi_latent_attention or config.transformer_impl != "transformer_engine":
        yield 'dsa needs multi_latent_attention and transformer_impl="transformer_engine"'


def _wrong_compression(config: TransformerConfig) -> Iterator[str]:
    if not config.compressed_attention:
        return
    ratios, layers = config.csa_compress_ratios, config.num_layers + config.mtp_stored_layers
    if len(ratios) < layers:
        yield f"csa_compress_ratios has {len(ratios)} entries for {layers} layers, MTP layers included"
    if wrong := [ratio for ratio in ratios if ratio < 0 or ratio == 1]:
        yield f"csa_compress_ratios holds {wrong}, expected 0 or 2 and more"
    indexer = ("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk")
    if 4 in ratios and (missing := [name for name in indexer if not getattr(config, name)]):
        yield f"sizes missing for layers of ratio 4: {', '.join(missing)}"
    if config.o_groups and config.num_attention_heads * config.v_head_dim % config.o_groups:
        heads = f"{config.num_attention_heads} heads of {config.v_head_dim}"
        yield f"{heads} do not divide among o_groups {config.o_groups}"
    if not config.multi_latent_attention or config.transformer_impl != "transformer_engine":
        yield 'dsv4_hybrid needs multi_latent_attention and transformer_impl="transformer_engine"'


def _wrong_experiments(config: TransformerConfig) -> Iterator[str]:
    """Settings that few models have, and that exclude others."""
    gpt_alone = {
        "hyper-connections": config.enable_hyper_connections,
        "dsv4_hybrid attention": config.compressed_attention,
        "dsa attention": config.sparse_attention,
        "window_size": config.window_size,
        "no_rope_freq": config.no_rope_freq,
    }
    if config.hybrid is not None and (found := [name for name, there in gpt_alone.items() if there]):
        yield f"not supported in models with a layer pattern: {', '.join(found)}"
    if config.window_size is not None and config.multi_latent_attention:
        yield "window_size is not supported with multi_latent_attention"
    if config.moe_n_hash_layers and not config.actual_vocab_size:
        yield "moe_n_hash_layers needs actual_vocab_size"
    if config.activation_func_clamp_value is not None and not config.gated_linear_unit:
        yield "activation_func_clamp_value needs gated_linear_unit"
