"""What a model's settings say about its layers: one description per layer of a stage."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mtp_convert.models.megatron.attention import SelfAttention, SelfAttentionSubmodules
from mtp_convert.models.megatron.backends import BackendSpecProvider, TESpecProvider, get_backend
from mtp_convert.models.megatron.compressed_attention import (
    CompressedSelfAttention,
    CompressedSelfAttentionSubmodules,
    CompressedSparseAttention,
)
from mtp_convert.models.megatron.compressed_keys import CompressorSubmodules
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.gdn import GatedDeltaNet, GatedDeltaNetSubmodules
from mtp_convert.models.megatron.hybrid_pattern import ATTENTION, GDN, MAMBA, MLA, MLP, MOE
from mtp_convert.models.megatron.hyper_connection import HyperConnection
from mtp_convert.models.megatron.mamba import MambaMixer, MambaMixerSubmodules
from mtp_convert.models.megatron.mla import MLASelfAttention, MLASelfAttentionSubmodules
from mtp_convert.models.megatron.mlp import MLP as FeedForward
from mtp_convert.models.megatron.mlp import MLPSubmodules
from mtp_convert.models.megatron.moe import MoELayer, MoESubmodules, SharedExpertMLP
from mtp_convert.models.megatron.mtp_block import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from mtp_convert.models.megatron.placement import get_mtp_num_layers_to_build
from mtp_convert.models.megatron.sparse_attention import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttention,
    DSAttentionSubmodules,
    SparseMLASelfAttention,
)
from mtp_convert.models.megatron.spec import ModuleSpec
from mtp_convert.models.megatron.transformer_block import HybridStack, TransformerBlockSubmodules, decoder_layers
from mtp_convert.models.megatron.transformer_layer import (
    MambaLayer,
    MambaLayerSubmodules,
    TransformerLayer,
    TransformerLayerSubmodules,
)

# Dense layers of the local backend are stored under the keys of fused ones.
_LOCAL_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def get_gpt_layer_spec(
    config: TransformerConfig, *, experts: bool, hashed: bool = False, attention: ModuleSpec | None = None
) -> ModuleSpec:
    """A layer of a GPT model: attention (by default the usual one) and feed-forward, of the kinds given.

    Experts of a `hashed` layer are chosen by token id.
    """
    backend = get_backend(config)
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm()
    attention = attention or attention_spec(config, backend)
    latent = config.multi_latent_attention and attention.module is not GatedDeltaNet
    connection = HyperConnection if config.enable_hyper_connections else None
    submodules = TransformerLayerSubmodules(
        input_layernorm=None if fused and not latent else norm,
        self_attention=attention,
        pre_mlp_layernorm=None if fused and not experts else norm,
        mlp=moe_spec(config, backend, hashed=hashed) if experts else mlp_spec(config, backend),
        self_attention_hyper_connection=connection,
        mlp_hyper_connection=connection,
        sharded_state_dict_keys_map={} if fused or latent else _LOCAL_KEYS,
    )
    return ModuleSpec(TransformerLayer, submodules=submodules)


def get_gpt_decoder_layer_specs(config: TransformerConfig) -> list[ModuleSpec]:
    """Every layer of the whole decoder."""
    choices: dict[int, Tensor] = {}
    return [
        get_gpt_layer_spec(
            config,
            experts=config.moe_layers[layer],
            hashed=layer < config.moe_n_hash_layers,
            attention=_gpt_attention_spec(config, layer, layer, choices),
        )
        for layer in range(config.num_layers)
    ]


def get_gpt_mtp_layer_specs(config: TransformerConfig) -> list[ModuleSpec]:
    """The layer inside every MTP layer: like the decoder's last, but for what Megatron finds by a layer's number.

    It counts MTP layers from the first one again, except for compress ratios.
    """
    experts = config.moe_layers[-1] if config.mtp_experts is None else config.mtp_experts
    last, choices = config.num_layers - 1, dict[int, Tensor]()
    return [
        get_gpt_layer_spec(
            config,
            experts=experts,
            attention=_gpt_attention_spec(config, last, min(depth, last), choices, depth=depth),
        )
        for depth in range(config.mtp_stored_layers)
    ]


def _gpt_attention_spec(
    config: TransformerConfig, kind: int, number: int, choices: MutableMapping[int, Tensor], *, depth: int | None = None
) -> ModuleSpec:
    """Attention of a layer like number `kind` that is counted as `number`, both from 0; of an MTP layer at `depth`."""
    backend = get_backend(config)
    if config.compressed_attention:
        entry = number if depth is None else config.num_layers + depth
        return compressed_attention_spec(backend, config.csa_compress_ratios[entry])
    if config.linear_attention_layers[kind]:
        return gated_delta_net_spec(config, backend)
    if config.sparse_attention:
        return sparse_attention_spec(config, backend, number, choices)
    spec = attention_spec(config, backend)
    if config.multi_latent_attention:
        return spec
    own = {"window": config.window_layers[number], "rotary": config.rotary_layers[number]}
    return replace(spec, params=own)


def get_gpt_decoder_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int = 0
) -> TransformerBlockSubmodules:
    """The decoder layers of one stage."""
    layers = decoder_layers(config, vp_stage, pp_rank)
    specs = get_gpt_decoder_layer_specs(config)[layers.start : layers.stop]
    return TransformerBlockSubmodules(specs, get_backend(config).layer_norm())


def get_gpt_mtp_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The MTP layers of one stage, each around a layer like the last of the decoder; None where there are none."""
    if not get_mtp_num_layers_to_build(config, vp_stage, pp_rank):
        return None
    backend = get_backend(config)
    inner = get_gpt_mtp_layer_specs(config)
    return MultiTokenPredictionBlockSubmodules([get_mtp_layer_spec_for_backend(layer, backend) for layer in inner])


def get_hybrid_stack_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int = 0
) -> tuple[TransformerBlockSubmodules, int]:
    """The main layers of one stage, and the number of layers on the stages before it.

    Stages are those of the pattern's `|`, or even parts if it has none. ValueError if there are more or fewer than the
    job has.
    """
    assert config.hybrid is not None
    stages = config.hybrid.stages
    ranks = config.pipeline_model_parallel_size
    if len(stages) == 1:
        layers = decoder_layers(config, vp_stage, pp_rank)
        symbols, offset = config.hybrid.main[layers.start : layers.stop], layers.start
    else:
        expected = ranks * (config.virtual_pipeline_model_parallel_size or 1)
        if len(stages) != expected:
            raise ValueError(f"the layer pattern has {len(stages)} stages, the job {expected}")
        stage = (vp_stage or 0) * ranks + pp_rank
        symbols, offset = stages[stage], sum(map(len, stages[:stage]))
    return hybrid_layers(config, symbols), offset


def get_hybrid_mtp_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The MTP layers of one stage, each around a stack of its own; None where there are none."""
    assert config.hybrid is not None
    if not get_mtp_num_layers_to_build(config, vp_stage, pp_rank):
        return None
    inner = ModuleSpec(HybridStack, params={"spec": hybrid_layers(config, config.hybrid.mtp)})
    layer = get_mtp_layer_spec_for_backend(inner, TESpecProvider())
    return MultiTokenPredictionBlockSubmodules([layer] * config.mtp_stored_layers)


def hybrid_layers(config: TransformerConfig, symbols: str) -> TransformerBlockSubmodules:
    """One layer per symbol, each of one block; hybrid models know TransformerEngine's way alone."""
    backend = TESpecProvider()
    return TransformerBlockSubmodules([_HYBRID_LAYERS[s](config, backend) for s in symbols], backend.layer_norm())


def attention_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Latent attention or attention over query groups."""
    column, fused = backend.column_parallel_linear(), backend.column_parallel_layer_norm_linear()
    if not config.multi_latent_attention:
        submodules = SelfAttentionSubmodules(
            linear_qkv=fused or column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            qk_layernorm=backend.layer_norm(),
        )
        return ModuleSpec(SelfAttention, submodules=submodules)
    normed = fused if fused and config.qk_layernorm else column
    return ModuleSpec(
        MLASelfAttention,
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=normed if config.megatron_version >= (0, 19) else column,
            linear_down_proj=backend.linear(),
            linear_up_proj=normed,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            layernorm=None if fused else backend.layer_norm(),
        ),
    )


def sparse_attention_spec(
    config: TransformerConfig, backend: BackendSpecProvider, number: int, choices: MutableMapping[int, Tensor]
) -> ModuleSpec:
    """Latent attention to chosen keys in layer `number`, from 0; see DSAttention for `choices`."""
    indexer = ModuleSpec(DSAIndexer, submodules=DSAIndexerSubmodules(backend.linear(), backend.layer_norm()))
    core = ModuleSpec(
        DSAttention,
        params={"layer": number, "source": config.indexing_layer(number), "choices": choices},
        submodules=DSAttentionSubmodules(indexer),
    )
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=backend.column_parallel_linear(),
        linear_down_proj=backend.linear(),
        linear_up_proj=backend.column_parallel_linear(),
        core_attention=core,
        linear_proj=backend.row_parallel_linear(),
        layernorm=backend.layer_norm(),
    )
    return ModuleSpec(SparseMLASelfAttention, submodules=submodules)


def compressed_attention_spec(backend: BackendSpecProvider, ratio: int) -> ModuleSpec:
    """Compressed attention whose keys behind the window stand for `ratio` tokens each; 0 for the window alone."""
    inner = CompressorSubmodules(backend.linear(), backend.layer_norm())
    submodules = CompressedSelfAttentionSubmodules(
        linear_q_down_proj=backend.linear(),
        linear_q_up_proj=backend.column_parallel_linear(),
        linear_kv_proj=backend.column_parallel_linear(),
        core_attention=ModuleSpec(CompressedSparseAttention, submodules=inner),
        linear_proj=backend.row_parallel_linear(),
        layernorm=backend.layer_norm(),
    )
    return ModuleSpec(CompressedSelfAttention, params={"compress_ratio": ratio}, submodules=submodules)


def gated_delta_net_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Linear attention; ValueError for a backend that cannot normalise inside a linear."""
    in_proj = backend.column_parallel_layer_norm_linear()
    if in_proj is None:
        raise ValueError('linear attention exists with transformer_impl="transformer_engine" alone')
    submodules = GatedDeltaNetSubmodules(in_proj, backend.layer_norm(), backend.row_parallel_linear())
    return ModuleSpec(GatedDeltaNet, submodules=submodules)


def mlp_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """A dense feed-forward block."""
    fc1 = backend.column_parallel_layer_norm_linear() or backend.column_parallel_linear()
    return ModuleSpec(FeedForward, submodules=MLPSubmodules(fc1, backend.row_parallel_linear()))


def moe_spec(config: TransformerConfig, backend: BackendSpecProvider, *, hashed: bool = False) -> ModuleSpec:
    """A mixture of experts, `hashed` if a table of token ids chooses them."""
    linears = MLPSubmodules(backend.column_parallel_linear(), backend.row_parallel_linear())
    submodules = MoESubmodules(
        experts=backend.grouped_mlp_modules(config.moe_grouped_gemm),
        shared_experts=ModuleSpec(SharedExpertMLP, submodules=linears),
    )
    return ModuleSpec(MoELayer, params={"hashed": hashed}, submodules=submodules)


def _mamba_layer(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    linears = MambaMixerSubmodules(backend.column_parallel_layer_norm_linear(), backend.row_parallel_linear())
    return ModuleSpec(MambaLayer, submodules=MambaLayerSubmodules(ModuleSpec(MambaMixer, submodules=linears)))


def _attention_layer(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    norm = backend.layer_norm() if config.multi_latent_attention else None
    return _layer(input_layernorm=norm, self_attention=attention_spec(config, backend))


def _moe_layer(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    return _layer(pre_mlp_layernorm=backend.layer_norm(), mlp=moe_spec(config, backend))


def _layer(**submodules: Any) -> ModuleSpec:  # noqa: ANN401
    return ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))


_HYBRID_LAYERS: dict[str, Callable[[TransformerConfig, BackendSpecProvider], ModuleSpec]] = {
    MAMBA: _mamba_layer,
    ATTENTION: _attention_layer,
    MLA: _attention_layer,
    MOE: _moe_layer,
    MLP: lambda config, backend: _layer(mlp=mlp_spec(config, backend)),
    GDN: lambda config, backend: _layer(self_attention=gated_delta_net_spec(config, backend)),
}
