"""DeepSeek-V4's config.json, as released or from transformers: which layers compress, which route by a table."""

from __future__ import annotations

from typing import Any

from mtp_convert.adapters._config import MOST, depth_field, number, optional
from mtp_convert.mapping.family import Config, ConfigError, DepthField

FIELDS = {
    "H": "hidden_size",
    "V": "vocab_size",
    "Q": "num_attention_heads",
    "D": "head_dim",
    "A": "q_lora_rank",
    "G": "o_groups",
    "O": "o_lora_rank",
    "E": "n_routed_experts",
    "I": "moe_intermediate_size",
    "K": "num_experts_per_tok",
    "s": "hc_mult",
    "X": "index_n_heads",
    "Y": "index_head_dim",
}
SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATES = {SPARSE: 4, HEAVY: 128}  # what the release has where the config names none


def read_ratios(config: Config, layers: int) -> list[int]:
    """Compression ratios of the layers, then of the MTP depths where the config goes on."""
    listed, kinds = config.get("compress_ratios"), config.get("layer_types")
    if not isinstance(listed, list) and not isinstance(kinds, list):
        raise ConfigError("neither compress_ratios nor layer_types is given")
    found = [_rate(config, kind) for kind in kinds[:layers]] if isinstance(kinds, list) else None
    ratios = list(listed) if isinstance(listed, list) else list(found or [])
    if len(ratios) < layers or not all(isinstance(r, int) and 0 <= r < MOST for r in ratios):
        raise ConfigError(f"compress_ratios must have a whole number for each of {layers} layers, got {ratios!r}")
    if found is not None and ratios[:layers] != found:
        raise ConfigError(f"compress_ratios {ratios[:layers]} and layer_types {found} disagree")
    return ratios


def _rate(config: Config, kind: object) -> int:
    rates = {SLIDING: 0, **RATES, **(config.get("compress_rates") or {})}
    if kind not in rates:
        raise ConfigError(f"layer_types names an unknown kind {kind!r}")
    return int(rates[kind])


def read_hashed(config: Config, layers: int) -> list[bool]:
    """Whether each layer routes by a table of token ids; those come first."""
    kinds, first = config.get("mlp_layer_types"), config.get("num_hash_layers")
    counted = [i < optional(config, "num_hash_layers", MOST) for i in range(layers)]
    if not isinstance(kinds, list):
        return counted
    found = [kind == "hash_moe" for kind in kinds[:layers]]
    if len(found) < layers or (first is not None and found != counted):
        raise ConfigError(f"mlp_layer_types {kinds} and num_hash_layers {first} disagree on {layers} layers")
    return found


def _corrected(config: Config, depths: int) -> dict[str, Any]:
    """Ratios of the MTP depths follow the number of stored depths where the config names them."""
    found = DEPTHS_ALONE.corrected(config, depths)
    ratios, layers = config.get("compress_ratios"), number(config, "num_hidden_layers", MOST)
    if isinstance(ratios, list) and len(ratios) > layers:
        of_depths = ratios[layers:]
        found["compress_ratios"] = ratios[:layers] + (of_depths + of_depths[-1:] * depths)[:depths]
    return found


DEPTHS_ALONE = depth_field("num_nextn_predict_layers")
DEPTHS = DepthField(DEPTHS_ALONE.declared, _corrected)
