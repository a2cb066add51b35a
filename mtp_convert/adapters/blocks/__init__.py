"""Blocks shared by families: params with shapes, and their rows in Megatron-Core's names.

A family takes a block with Hugging Face names, or adds its own with `with_hf`. Every file has its shape legend.
"""

from mtp_convert.adapters.blocks.attention import Attention, attention, llama_attention
from mtp_convert.adapters.blocks.base import (
    MEGATRON_FORMS,
    MEGATRON_WORDS,
    halves,
    joined,
    megatron_words,
    renamed,
    respelled,
    te,
    te_attention,
    with_copies,
    with_hf,
)
from mtp_convert.adapters.blocks.decoder import (
    EXPERTS,
    GROUPED_WORDS,
    LATENT_WORDS,
    MEGATRON,
    NATIVE,
    TRUNKS,
    Depth,
    HfPrefixes,
    Layer,
    choices,
    ends,
    homogeneous,
    places,
)
from mtp_convert.adapters.blocks.delta_net import DeltaNet, delta_net, qwen_delta_net
from mtp_convert.adapters.blocks.kda import Kda, kda, kimi_kda
from mtp_convert.adapters.blocks.mamba import Mamba, hf_mamba_rows, mamba
from mtp_convert.adapters.blocks.mla import Indexer, Mla, deepseek_mla, mla
from mtp_convert.adapters.blocks.mlp import Mlp, llama_mlp, mlp
from mtp_convert.adapters.blocks.moe import Moe, llama_moe, moe
from mtp_convert.adapters.blocks.mtp import hf_fusion, mtp_final_norm, mtp_fusion
from mtp_convert.adapters.blocks.streams import hyper_connection

__all__ = [
    "EXPERTS",
    "GROUPED_WORDS",
    "LATENT_WORDS",
    "MEGATRON",
    "MEGATRON_FORMS",
    "MEGATRON_WORDS",
    "NATIVE",
    "TRUNKS",
    "Attention",
    "DeltaNet",
    "Depth",
    "HfPrefixes",
    "Indexer",
    "Kda",
    "Layer",
    "Mamba",
    "Mla",
    "Mlp",
    "Moe",
    "attention",
    "choices",
    "deepseek_mla",
    "delta_net",
    "ends",
    "halves",
    "hf_fusion",
    "hf_mamba_rows",
    "homogeneous",
    "hyper_connection",
    "joined",
    "kda",
    "kimi_kda",
    "llama_attention",
    "llama_mlp",
    "llama_moe",
    "mamba",
    "megatron_words",
    "mla",
    "mlp",
    "moe",
    "mtp_final_norm",
    "mtp_fusion",
    "places",
    "qwen_delta_net",
    "renamed",
    "respelled",
    "te",
    "te_attention",
    "with_copies",
    "with_hf",
]
