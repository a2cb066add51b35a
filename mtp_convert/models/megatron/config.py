"""What decides the names, the shapes and the numbers of a Megatron model, under Megatron's names.

Fields of Megatron-Core's TransformerConfig and of its model constructors stand side by side, as in the arguments that
Megatron-LM stores with a checkpoint. Settings of speed, memory and optimisation are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch

from mtp_convert.models.megatron import config_args, config_checks, config_hf
from mtp_convert.models.megatron.hybrid_pattern import ATTENTION, COMPRESSED, GDN, MLA, MLP, MOE, HybridPattern
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout


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
    window_size: tuple[int, int] | None = None  # tokens before and behind it that a query sees; causal in any case
    window_attn_skip_freq: int | tuple[int, ...] | None = None  # N: every Nth layer sees all; list: 1 has the window
    no_rope_freq: int | tuple[int, ...] | None = None  # N: every Nth layer has no positions; list: 1 has none
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

    # "dsa": latent attention to keys that an indexer chooses; "dsv4_hybrid": compressed attention, a kind of it as well
    experimental_attention_variant: str | None = None
    csa_compress_ratios: tuple[int, ...] = ()  # of every layer and every MTP layer; 0: a window alone
    csa_window_size: int = 0
    csa_compress_rotary_base: float = 40000.0  # of layers with compressed keys
    o_groups: int = 0  # of heads, for the output projection
    o_lora_rank: int = 0  # of each of them
    dsa_indexer_n_heads: int = 0
    dsa_indexer_head_dim: int = 0
    dsa_indexer_topk: int = 0  # keys that a token sees; of compressed attention, in layers of ratio 4
    dsa_indexer_topk_freq: int = 1  # N: behind the first layers, every Nth one chooses; the others see the same keys
    dsa_indexer_skip_topk_offset: int = 0  # how many first layers choose; 0 counts as 1
    dsa_indexer_rope_interleaved: bool = False  # neighbours form a pair
    dsa_indexer_scoring_relu: bool = True
    dsa_indexer_k_norm_epsilon: float | None = None  # None: the model's

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
    mtp_experts: bool | None = None  # whether MTP layers have experts, if unlike the last layer; in Megatron by spec
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
        if problems := list(config_checks.problems(self)):
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
        return self._all_but_every(self.linear_attention_freq, absent=False)

    @cached_property
    def window_layers(self) -> tuple[bool, ...]:
        """For every layer of a GPT model whether attention sees a window alone."""
        if self.window_size is None:
            return (False,) * self.num_layers
        return self._all_but_every(self.window_attn_skip_freq, absent=True)

    @cached_property
    def rotary_layers(self) -> tuple[bool, ...]:
        """For every layer of a GPT model whether attention knows positions, if the model's are rotary."""
        freq = self.no_rope_freq
        return tuple(not x for x in freq) if isinstance(freq, tuple) else self._all_but_every(freq, absent=True)

    def _all_but_every(self, freq: int | tuple[int, ...] | None, *, absent: bool) -> tuple[bool, ...]:
        """For every layer what a list says, or that it is not a `freq`-th one; `absent` without either."""
        if freq is None:
            return (absent,) * self.num_layers
        if isinstance(freq, int):
            return tuple((layer + 1) % freq != 0 for layer in range(self.num_layers))
        return tuple(map(bool, freq))

    def indexing_layer(self, layer: int) -> int:
        """Number, from 0, of the layer whose indexer chooses the keys of layer number `layer`."""
        own = max(self.dsa_indexer_skip_topk_offset, 1)
        return layer - max(layer + 1 - own, 0) % self.dsa_indexer_topk_freq

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
    def sparse_attention(self) -> bool:
        """Whether attention is latent and sees what an indexer chooses, as in DeepSeek-V3.2."""
        return self.experimental_attention_variant == "dsa"

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
