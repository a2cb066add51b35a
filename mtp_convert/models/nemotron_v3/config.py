"""What a Nemotron-H config says about every block, MTP included, and the choices that it leaves open.

D is the number of MTP depths, P the number of sub-layers of one depth.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypeAlias

from transformers import NemotronHConfig

from mtp_convert.models.mtp import MTPConfig

BlockType: TypeAlias = Literal["mamba", "attention", "mlp", "moe"]

_SYMBOLS: dict[str, BlockType] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
# transformers has renamed two of them.
_WORDS: dict[str, BlockType] = {
    **{word: word for word in _SYMBOLS.values()},
    "linear_attention": "mamba",
    "full_attention": "attention",
}


@dataclass(frozen=True)
class Numerics:
    """Where transformers and NeMo AutoModel compute different numbers from the same weights.

    `Numerics()` is transformers, `Numerics.automodel()` is NeMo AutoModel 0.7; each field can be chosen alone.

    Attributes:
        normalize_top1: with one expert per token, divide its weight by itself, so that only the scaling factor is
            left. False: the weight is the expert's own score.
        masked_groups: the score of experts in router groups that were not chosen. "excluded": minus infinity.
            "zero": 0, so that they win over experts whose biased score is negative.
        time_step_limit: the config field that bounds Mamba's time steps: "time_step_min" (no upper bound) or
            "time_step_limit". Released configs allow every positive step with the latter.
        mask_after_conv: a padding mask is applied behind Mamba's convolution too. False: its bias reaches the states
            of left-padded rows.
        residual_in_fp32: obey the config field of this name. False: the residual stream has the weights' type.
        attention_bias: obey the config field of this name. False: attention has no biases, whatever it says.
        float32_logits: logits are float32 whatever the weights' type.
    """

    normalize_top1: bool = True
    masked_groups: Literal["excluded", "zero"] = "excluded"
    time_step_limit: Literal["time_step_min", "time_step_limit"] = "time_step_min"
    mask_after_conv: bool = True
    residual_in_fp32: bool = False
    attention_bias: bool = False
    float32_logits: bool = True

    @classmethod
    def automodel(cls) -> Self:
        """The rules of NeMo AutoModel 0.7."""
        return cls(
            normalize_top1=False,
            masked_groups="zero",
            time_step_limit="time_step_limit",
            mask_after_conv=False,
            residual_in_fp32=True,
            attention_bias=True,
            float32_logits=False,
        )


@dataclass(frozen=True)
class BackendConfig:
    """Which code computes; Mamba's kernels are used wherever they are installed, attention is PyTorch's.

    `experts`: transformers' implementation of the routed experts; its own default is "grouped_mm".
    """

    experts: Literal["eager", "batched_mm", "grouped_mm"] = "grouped_mm"


@dataclass(frozen=True)
class MoEConfig:
    """The config fields of mixture-of-experts blocks, to replace what a config says.

    `moe_latent_size` None: experts read the hidden state itself. Other fields are named as in transformers.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    @classmethod
    def from_hf(cls, config: NemotronHConfig) -> Self:
        """What `config` says itself."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def problems(self) -> list[str]:
        """Why no router can work like this, if it cannot."""
        found = []
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups or experts // groups < 2:
            found.append(f"{experts} experts in {groups} groups, expected equal groups of at least 2")
        elif not 0 < self.topk_group <= groups:
            found.append(f"topk_group is {self.topk_group}, expected 1 to {groups}")
        elif not 0 < self.num_experts_per_tok <= experts // groups * self.topk_group:
            reach = experts // groups * self.topk_group
            found.append(f"num_experts_per_tok is {self.num_experts_per_tok}, expected 1 to {reach} (those in reach)")
        return found


def prepare_config(
    config: NemotronHConfig,
    *,
    backend: BackendConfig,
    moe_config: MoEConfig | None,
    moe_overrides: Mapping[str, Any] | None,
) -> tuple[NemotronHConfig, MoEConfig | None]:
    """A private copy of `config` that the blocks can be built from, and its MoE part (None: it has no experts).

    Raises ValueError that lists everything the model cannot run.
    """
    if moe_config is not None and moe_overrides is not None:
        raise ValueError("moe_config and moe_overrides cannot both be given")
    config = copy.deepcopy(config)
    types = [*block_types(config), *(mtp_block_types(config) or ())]
    if "moe" in types:
        moe = replace(moe_config or MoEConfig.from_hf(config), **(moe_overrides or {}))
        for field in fields(moe):
            setattr(config, field.name, getattr(moe, field.name))
        problems = moe.problems()
    else:
        moe, problems = None, []
    if config.tie_word_embeddings:
        problems.append("tie_word_embeddings is true, but Nemotron-H's head is a parameter of its own")
    if problems:
        raise ValueError("config: " + "; ".join(problems))
    config._attn_implementation = "sdpa"
    config._experts_implementation = backend.experts
    return config, moe


def block_types(config: NemotronHConfig) -> list[BlockType]:
    """Kinds of the backbone's blocks, in order."""
    return _translate(config.layers_block_type or (), "layers_block_type")


def parse_mtp_layer_pattern(pattern: str) -> list[BlockType]:
    """Kinds of the sub-layers of a depth: "M" mamba, "*" attention, "-" mlp, "E" moe.

    Raises ValueError if the pattern is empty or has other symbols.
    """
    if not pattern:
        raise ValueError("MTP layer pattern is empty")
    if unknown := sorted(set(pattern) - _SYMBOLS.keys()):
        raise ValueError(f"Unknown MTP layer symbol in {pattern!r}: {unknown}, expected {sorted(_SYMBOLS)}")
    return [_SYMBOLS[symbol] for symbol in pattern]


def mtp_block_types(config: object) -> list[BlockType] | None:
    """Kinds of a depth's sub-layers, by `mtp_hybrid_override_pattern` or else `mtp_layers_block_type`; None: neither.

    Raises ValueError for kinds or symbols that are unknown.
    """
    if pattern := getattr(config, "mtp_hybrid_override_pattern", None):
        return parse_mtp_layer_pattern(pattern)
    if words := getattr(config, "mtp_layers_block_type", None):
        return _translate(words, "mtp_layers_block_type")
    return None


def build_mtp_config_from_hf(
    config: object,
    *,
    loss_scaling_factor: float = 0.1,
    num_nextn_predict_layers: int | None = None,
    use_repeated_layer: bool = False,
) -> MTPConfig:
    """MTP as the config describes it; `num_nextn_predict_layers` replaces its D.

    A config does not say whether depths share weights. Exports of models whose depths do usually give the number of
    stored depths (1): then give the number that runs, and `use_repeated_layer`.

    Raises ValueError if there are depths and no word about their sub-layers.
    """
    declared = getattr(config, "num_nextn_predict_layers", None)
    depths = int(declared or 0) if num_nextn_predict_layers is None else num_nextn_predict_layers
    types = mtp_block_types(config)
    if depths and types is None:
        raise ValueError(
            f"{depths} MTP depths, but the config has neither mtp_hybrid_override_pattern nor mtp_layers_block_type"
        )
    symbol_of = {kind: symbol for symbol, kind in _SYMBOLS.items()}
    return MTPConfig(
        num_layers=depths,
        layer_pattern="".join(symbol_of[kind] for kind in types or ()),
        loss_scaling_factor=loss_scaling_factor,
        use_repeated_layer=use_repeated_layer,
    )


def _translate(words: Sequence[str], field: str) -> list[BlockType]:
    if unknown := sorted(set(words) - _WORDS.keys()):
        raise ValueError(f"{field} has unknown block types {unknown}, expected {sorted(_WORDS)}")
    return [_WORDS[word] for word in words]
