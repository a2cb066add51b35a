"""DeepSeek-V4 with MTP: transformers' backbone and the depths that transformers leaves out."""

from mtp_convert.models.deepseek_v4.config import BackendConfig, MoEConfig, read_config
from mtp_convert.models.deepseek_v4.model import DeepseekV4CausalLMOutput, DeepseekV4ForCausalLM
from mtp_convert.models.deepseek_v4.mtp import (
    DeepseekV4MTPBlock,
    DeepseekV4MTPModule,
    build_deepseek_v4_mtp,
    build_mtp_config_from_hf,
)

__all__ = [
    "BackendConfig",
    "DeepseekV4CausalLMOutput",
    "DeepseekV4ForCausalLM",
    "DeepseekV4MTPBlock",
    "DeepseekV4MTPModule",
    "MoEConfig",
    "build_deepseek_v4_mtp",
    "build_mtp_config_from_hf",
    "read_config",
]
