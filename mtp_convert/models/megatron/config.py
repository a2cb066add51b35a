"""What decides the names, the shapes and the numbers of a Megatron model, under Megatron's names.

Fields of Megatron-Core's TransformerConfig and of its model constructors stand side by side, as in the arguments that
Megatron-LM stores with a checkpoint. Settings of speed, memory and optimisation are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch

from mtp_convert.models.megatron import config_args, config_hf
from mtp_convert.models.megatron.hybrid_pattern import ATTENTION, GDN, MAMBA, MLA, MLP, MOE, HybridPattern
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout

COMPRESSED = "C"  # compressed attention, a block of GPT models alone

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
    "experimental_attention_variant": (None, "gated_delta_net", "dsv4_hybrid"),
    "moe_router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "recompute_granularity": (None, "full"),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One model; sizes are those of the whole model, whatever the parallel job.

    Raises ValueError that names every setting that is missing, unknown or at odds with another.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int  # rows of the embedding, padding included
    max_position_embeddings: int = 4096
    megatron_version: tuple[int, int] = (0, 19)  # whose names the tree has; 0.12 and later
    transformer_impl: str = "transformer_engine"  # or "local": norms beside the linears instead of inside
    params_dtype: torch.dtype = torch.float32
    init_method_std: float = 0.02

    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "none"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0  # share of every head that is rotated
    rotary_interleaved: bool = False  # neighbours form a pair, instead of the halves; never for latent attention
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False  # norm weights are stored minus one
    add_bias_linear: bool = False
    add_qkv_bias: bool = False

    num_attention_heads: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0  # size of a head
    qk_layernorm: bool = False
    attention_output_gate: bool = False
    ffn_hidden_size: int = 0
    gated_linear_unit: bool = False
    activation: str = "silu"
    activation_func_clamp_value: float | None = None  # largest gate, and largest absolute value beside it

    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_head_dim: int = 0  # not rotated
    qk_pos_emb_head_dim: int = 0  # rotated
    v_head_dim: int = 0
    rope_type: str = "rope"  # of latent attention
    rotary_scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    experimental_attention_variant: str | None = None  # "dsv4_hybrid": compressed attention, a kind of latent attention
    csa_compress_ratios: tuple[int, ...] = ()  # of every layer and every MTP layer; 0: a window alone
    csa_window_size: int = 0
    csa_compress_rotary_base: float = 40000.0  # of layers with compressed keys
    o_groups: int = 0  # of heads, for the output projection
    o_lora_rank: int = 0  # of each of them
    dsa_indexer_n_heads: int = 0
    dsa_indexer_head_dim: int = 0
    dsa_indexer_topk: int = 0  # compressed keys that a token sees, in layers of ratio 4

    enable_hyper_connections: bool = False
    num_residual_streams: int = 4
    mhc_sinkhorn_iterations: int = 20
    mhc_init_gating_factor: float = 0.01
    mhc_epsilon: float = 1e-6

    linear_attention_freq: int | tuple[int, ...] | None = None  # N: full attention every Nth layer; list: 1 is linear
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0

    num_moe_experts: int | None = None
    moe_layer_freq: int | tuple[int, ...] = 1  # N: experts every Nth layer from the first; list: 1 has experts
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None  # size that the routed experts see
    moe_grouped_gemm: bool = True  # all experts in one module; else, and always in "local", one by one
    moe_router_topk: int = 0
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_enable_expert_bias: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_n_hash_layers: int = 0  # first layers, whose experts a table of token ids chooses
    actual_vocab_size: int = 0  # rows of that table

    hybrid_layer_pattern: str | None = None  # see HybridPattern; makes the model a hybrid
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    mamba_num_groups: int = 0

    mtp_num_layers: int | None = None  # depths that run
    mtp_use_repeated_layer: bool = False  # they all run the one stored layer
    mtp_loss_scaling_factor: float = 0.1
    mtp_detach_heads: bool = False  # MTP loss trains the MTP layers alone
    calculate_per_token_loss: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None

    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    pipeline_model_parallel_layout: PipelineParallelLayerLayout | None = None
    hetereogenous_dist_checkpoint: bool = False  # Megatron's spelling; layers are stored one by one

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], **changes: object) -> Self:
        """From a `config.json`; `changes` replace fields. ValueError names what is missing or not supported."""
        return cls(**{**config_hf.settings(config), **changes})

    @classmethod
    def from_megatron_args(cls, args: Mapping[str, Any], **changes: object) -> Self:
        """From the arguments of a checkpoint (`vars(args)`) or the fields of Megatron's TransformerConfig.

        `changes` replace fields. ValueError names what is missing or not supported.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{**config_args.settings(args, known), **changes})

    @cached_property
    def hybrid(self) -> HybridPattern | None:
        """The layer pattern, None for a GPT model."""
        return None if self.hybrid_layer_pattern is None else HybridPattern.parse(self.hybrid_layer_pattern)

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """For every layer of a GPT model whether it has experts."""
        freq = self.moe_layer_freq
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        if isinstance(freq, int):
            return tuple(layer % freq == 0 for layer in range(self.num_layers))
        return tuple(map(bool, freq))

    @cached_property
    def linear_attention_layers(self) -> tuple[bool, ...]:
        """For every layer of a GPT model whether its attention is linear."""
        freq = self.linear_attention_freq
        if freq is None:
            return (False,) * self.num_layers
        if isinstance(freq, int):
            return tuple((layer + 1) % freq != 0 for layer in range(self.num_layers))
        return tuple(map(bool, freq))

    @property
    def homogeneous(self) -> bool:
        """Whether Megatron stores the decoder layers of this GPT model stacked, one tensor for all of them."""
        return (
            self.moe_layer_freq == 1
            and self.linear_attention_freq in (None, 1)
            and not self.moe_n_hash_layers
            and not self.compressed_attention
            and not self.hetereogenous_dist_checkpoint
        )

    @property
    def compressed_attention(self) -> bool:
        """Whether layers have the attention of DeepSeek-V4."""
        return self.experimental_attention_variant == "dsv4_hybrid"

    @property
    def mtp_stored_layers(self) -> int:
        """How many `mtp.layers.N` there are."""
        depths = self.mtp_num_layers or 0
        return min(depths, 1) if self.mtp_use_repeated_layer else depths

    @property
    def mtp_inner_name(self) -> str:
        """The name of the layer inside an MTP layer, in module trees (`mp_rank` files)."""
        return "transformer_layer" if self.megatron_version < (0, 17) else "mtp_model_layer"

    @property
    def blocks(self) -> str:
        """The symbols of the blocks that the model is made of."""
        if self.hybrid is not None:
            return self.hybrid.main + self.hybrid.mtp
        attention = MLA if self.multi_latent_attention else ATTENTION
        attention = COMPRESSED if self.compressed_attention else attention
        mixers = {GDN if linear else attention for linear in self.linear_attention_layers}
        return "".join(sorted(mixers | {MOE if experts else MLP for experts in self.moe_layers}))

    def _problems(self) -> Iterator[str]:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                yield f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
        wrong = list(self._wrong_frequencies())
        yield from wrong
        if not wrong:  # else it is not known which blocks there are
            yield from self._wrong_blocks()
        yield from self._wrong_counts()
        yield from self._wrong_compression()
        yield from self._wrong_experiments()

    def _wrong_frequencies(self) -> Iterator[str]:
        for name in ("moe_layer_freq", "linear_attention_freq"):
            freq = getattr(self, name)
            if isinstance(freq, int) and freq < 1:
                yield f"{name} is {freq}, expected 1 or more"
            if isinstance(freq, tuple) and len(freq) != self.num_layers:
                yield f"{name} has {len(freq)} entries for {self.num_layers} layers"

    def _wrong_blocks(self) -> Iterator[str]:
        needed = {"hidden_size", "vocab_size"}.union(*(_SIZES[block] for block in self.blocks))
        if missing := sorted(name for name in needed if not getattr(self, name)):
            yield f"sizes missing: {', '.join(missing)}"
        if MAMBA in self.blocks and self.megatron_version < (0, 19):
            yield f"Mamba mixers have other names before 0.19, megatron_version is {self.megatron_version}"
        if GDN in self.blocks and self.activation != "silu":
            yield f"linear attention needs activation 'silu', got {self.activation!r}"

    def _wrong_counts(self) -> Iterator[str]:
        for whole, part in (
            ("num_attention_heads", "num_query_groups"),
            ("mamba_num_heads", "mamba_num_groups"),
            ("linear_num_value_heads", "linear_num_key_heads"),
            ("num_moe_experts", "moe_router_num_groups"),
        ):
            total, parts = getattr(self, whole), getattr(self, part)
            if parts and (total or 0) % parts:
                yield f"{whole} {total} is no multiple of {part} {parts}"
        if self.moe_router_num_groups and not self.moe_router_group_topk:
            yield "moe_router_num_groups needs moe_router_group_topk"
        if self.hybrid is not None:
            if len(self.hybrid.main) != self.num_layers:
                yield f"{len(self.hybrid.main)} layers in the pattern, num_layers is {self.num_layers}"
            depths = self.mtp_stored_layers if self.hybrid.mtp_depths == 1 else self.mtp_num_layers or 0
            if self.hybrid.mtp_depths != depths:
                yield f"{self.hybrid.mtp_depths} MTP depths in the pattern, mtp_num_layers is {self.mtp_num_layers}"

    def _wrong_compression(self) -> Iterator[str]:
        if not self.compressed_attention:
            return
        ratios, layers = self.csa_compress_ratios, self.num_layers + self.mtp_stored_layers
        if len(ratios) < layers:
            yield f"csa_compress_ratios has {len(ratios)} entries for {layers} layers, MTP layers included"
        if wrong := [ratio for ratio in ratios if ratio < 0 or ratio == 1]:
            yield f"csa_compress_ratios holds {wrong}, expected 0 or 2 and more"
        indexer = ("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk")
        if 4 in ratios and (missing := [name for name in indexer if not getattr(self, name)]):
            yield f"sizes missing for layers of ratio 4: {', '.join(missing)}"
        if self.o_groups and self.num_attention_heads * self.v_head_dim % self.o_groups:
            yield f"{self.num_attention_heads} heads of {self.v_head_dim} do not divide among o_groups {self.o_groups}"
        if not self.multi_latent_attention or self.transformer_impl != "transformer_engine":
            yield 'dsv4_hybrid needs multi_latent_attention and transformer_impl="transformer_engine"'

    def _wrong_experiments(self) -> Iterator[str]:
        """Settings that few models have, and that exclude others."""
        if self.hybrid is not None and (self.enable_hyper_connections or self.compressed_attention):
            yield "hyper-connections and dsv4_hybrid attention are not supported in models with a layer pattern"
        if self.moe_n_hash_layers and not self.actual_vocab_size:
            yield "moe_n_hash_layers needs actual_vocab_size"
        if self.activation_func_clamp_value is not None and not self.gated_linear_unit:
            yield "activation_func_clamp_value needs gated_linear_unit"
