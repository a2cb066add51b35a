"""What a DeepSeek-V4 config says about every layer, MTP depths included, and the choices it leaves open.

N is the number of backbone layers, D the number of MTP depths. transformers' config knows N layers only:
`read_config` keeps the compress ratios of the MTP depths beside it, as `compress_ratios` of N + D entries.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from transformers import DeepseekV4Config

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"  # overlapping windows and an indexer that picks entries
HCA = "heavily_compressed_attention"  # disjoint windows, every complete one is seen
_CSA_RATIO, _HCA_RATIO = 4, 128  # of the releases; where a config has only ratios, 4 means CSA

ConfigSource: TypeAlias = DeepseekV4Config | Mapping[str, Any] | Path


@dataclass(frozen=True)
class AttentionKind:
    """How one layer attends, and how many tokens one of its compressed entries pools (0: it has none)."""

    layer_type: str
    ratio: int


@dataclass(frozen=True)
class MoEConfig:
    """How tokens are routed where transformers and NeMo AutoModel differ; the default is transformers.

    `normalization`: "always" divides the weights of a token's experts by their sum; "configured" does so only
    if the config's `norm_topk_prob` is true and a token has more than one expert. Layers that route by token id
    normalise either way.
    `route_padding`: where padded tokens get routed experts beside the shared one: "always", in the depths of "mtp"
    alone, or "never". Valid tokens do not depend on it.
    """

    normalization: Literal["always", "configured"] = "always"
    route_padding: Literal["always", "mtp", "never"] = "always"

    @classmethod
    def automodel(cls) -> Self:
        """The rules of NeMo AutoModel 0.7."""
        return cls(normalization="configured", route_padding="mtp")


@dataclass(frozen=True)
class BackendConfig:
    """Which kernels compute, and what is computed in float32 beyond what transformers does.

    `experts`: transformers' implementation of the routed experts.
    `float32_head`: the output head is stored and multiplied in float32, its logits then cast back.
    `float32_compressor`: the same for the projections that pool keys, in compressors and indexers.
    Both change bfloat16 models alone. AutoModel's float32 activation inside experts is not offered.
    """

    experts: Literal["eager", "batched_mm", "grouped_mm"] = "eager"
    float32_head: bool = False
    float32_compressor: bool = False

    @classmethod
    def automodel(cls) -> Self:
        """The float32 islands of NeMo AutoModel 0.7 that transformers does not have."""
        return cls(float32_head=True, float32_compressor=True)


def read_config(source: ConfigSource, *, num_nextn_predict_layers: int | None = None) -> DeepseekV4Config:
    """A config with `layer_types` [N], `mlp_layer_types` [N] and `compress_ratios` [N + D] filled in.

    `source` is a folder with a config.json, its content, or a transformers config. Both spellings are read:
    `layer_types` with `compress_rates`, and `compress_ratios` as in the releases and in NeMo AutoModel. MTP depths
    without a ratio of their own use sliding attention. `num_nextn_predict_layers` replaces the stored D.

    Raises ValueError that lists everything the model cannot run or that contradicts itself.
    """
    raw = _raw(source)
    if num_nextn_predict_layers is not None:
        raw["num_nextn_predict_layers"] = num_nextn_predict_layers
    raw["num_nextn_predict_layers"] = int(raw.get("num_nextn_predict_layers") or 0)
    ratios: list[int] | None = raw.pop("compress_ratios", None)
    rates = {CSA: _CSA_RATIO, HCA: _HCA_RATIO} | dict(raw.get("compress_rates") or {})
    if problems := [*_unsupported(raw), *_ratio_problems(raw, ratios, rates)]:
        raise ValueError("config.json: " + "; ".join(problems))
    if ratios is not None and not raw.get("layer_types"):
        backbone = ratios[: raw.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)]
        raw["layer_types"] = [_kind(ratio, rates[CSA]).layer_type for ratio in backbone]
    config = DeepseekV4Config.from_dict(raw)
    config.compress_rates = rates
    if ratios is None:
        ratios = [rates.get(layer_type, 0) for layer_type in config.layer_types or ()]
    total = config.num_hidden_layers + config.num_nextn_predict_layers
    config.compress_ratios = (ratios + [0] * total)[:total]
    return config


def attention_kinds(config: DeepseekV4Config) -> tuple[AttentionKind, ...]:
    """The kinds of all N + D layers, in order."""
    types, rates = config.layer_types or [], config.compress_rates or {}
    own = [rates.get(layer_type, 0) for layer_type in types] + [0] * config.num_nextn_predict_layers
    ratios: list[int] = getattr(config, "compress_ratios", own)
    backbone = [AttentionKind(t, r) for t, r in zip(types, ratios, strict=False)]
    return (*backbone, *(_kind(ratio, rates[CSA]) for ratio in ratios[len(types) :]))


def hash_layers(config: DeepseekV4Config) -> tuple[int, ...]:
    """Backbone layers that choose experts by token id; no MTP depth does."""
    return tuple(i for i, kind in enumerate(config.mlp_layer_types or ()) if kind == "hash_moe")


def _raw(source: ConfigSource) -> dict[str, Any]:
    if isinstance(source, Path):
        return dict(json.loads((source / "config.json").read_text()))
    return dict(source) if isinstance(source, Mapping) else dict(source.to_dict())


def _kind(ratio: int, csa_ratio: int) -> AttentionKind:
    if ratio == 0:
        return AttentionKind(SLIDING, 0)
    return AttentionKind(CSA if ratio == csa_ratio else HCA, ratio)


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    """Fields that name another architecture, or one that no release has."""
    problems = []
    if raw.get("dspark_block_size") is not None:
        problems.append("dspark_block_size is set: `mtp.*` holds a block drafter, not MTP depths")
    if raw.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings is true: the head is a parameter of its own in DeepSeek-V4")
    for field in ("num_hidden_layers", "num_nextn_predict_layers"):
        if raw.get(field, 1) < 0:
            problems.append(f"{field} is {raw[field]}, expected 0 or more")
    return problems


def _ratio_problems(raw: Mapping[str, Any], ratios: list[int] | None, rates: Mapping[str, int]) -> list[str]:
    if ratios is None:
        return []
    layers = raw.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)
    problems = [f"compress_ratios[{i}] is {r}, expected 0 or more" for i, r in enumerate(ratios) if r < 0]
    if len(ratios) < layers:
        problems.append(f"compress_ratios has {len(ratios)} entries, expected one for each of {layers} layers")
    for i, (layer_type, ratio) in enumerate(zip(raw.get("layer_types") or (), ratios, strict=False)):
        if (ratio == 0) != (layer_type == SLIDING) or (layer_type == CSA and ratio != rates[CSA]):
            problems.append(f"compress_ratios[{i}] is {ratio}, but layer_types[{i}] is {layer_type}")
    return problems
