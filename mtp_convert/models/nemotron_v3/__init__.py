"""Nemotron-V3 with MTP: transformers' blocks, the depths that transformers leaves out, and generation with them."""

from mtp_convert.models.nemotron_v3.backbone import NemotronV3Model
from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.config import (
    BackendConfig,
    MoEConfig,
    Numerics,
    build_mtp_config_from_hf,
    parse_mtp_layer_pattern,
)
from mtp_convert.models.nemotron_v3.model import ModelClass, NemotronHForCausalLM
from mtp_convert.models.nemotron_v3.mtp import NemotronV3MTPSublayer, build_nemotron_v3_mtp
from mtp_convert.models.nemotron_v3.outputs import NemotronHCausalLMOutputWithPast
from mtp_convert.models.nemotron_v3.speculation import SpeculativeOutput

__all__ = [
    "BackendConfig",
    "MoEConfig",
    "ModelClass",
    "NemotronHCausalLMOutputWithPast",
    "NemotronHForCausalLM",
    "NemotronHybridCache",
    "NemotronV3MTPSublayer",
    "NemotronV3Model",
    "Numerics",
    "SpeculativeOutput",
    "build_mtp_config_from_hf",
    "build_nemotron_v3_mtp",
    "parse_mtp_layer_pattern",
]
