"""Sizes and choices of a Megatron-Core HybridModel, from an HF config or from Megatron's arguments.

Only what the forward pass cannot read off the weights' shapes is here. Settings that
`megatron_hybrid` does not implement (biases, rotary positions, gated MLPs, softmax routers ...)
are refused by name instead of ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCKS = "M*-E"  # Mamba2, attention, dense MLP, mixture of experts: one block per layer
# config.json spells blocks in words; the first four words are the ones before transformers 5.
_SYMBOL_OF = {
    "mamba": "M",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
    "linear_attention": "M",
    "full_attention": "*",
}

# field, blocks that need it (" " = always), name in config.json, name of Megatron's argument
_SIZES: tuple[tuple[str, str, str, str], ...] = (
    ("hidden_size", " ", "hidden_size", "hidden_size"),
    ("num_attention_heads", "*", "num_attention_heads", "num_attention_heads"),
    ("num_query_groups", "*", "num_key_value_heads", "num_query_groups"),
    ("kv_channels", "*", "head_dim", "kv_channels"),
    ("mamba_num_heads", "M", "mamba_num_heads", "mamba_num_heads"),
    ("mamba_head_dim", "M", "mamba_head_dim", "mamba_head_dim"),
    ("mamba_state_dim", "M", "ssm_state_size", "mamba_state_dim"),
    ("mamba_num_groups", "M", "n_groups", "mamba_num_groups"),
    ("moe_router_topk", "E", "num_experts_per_tok", "moe_router_topk"),
)
# What the forward pass takes for granted. A source that does not mention a setting is believed.
_HF_FIXED: dict[str, tuple[str, object]] = {
    "attention_bias": ("*", False),
    "mlp_bias": ("-E", False),
    "mlp_hidden_act": ("-E", "relu2"),
    "norm_topk_prob": ("E", True),
    "use_bias": ("M", False),
    "mamba_proj_bias": ("M", False),
    "use_conv_bias": ("M", True),
    "mamba_hidden_act": ("M", "silu"),
}
_MEGATRON_FIXED: dict[str, tuple[str, object]] = {
    "normalization": (" ", "RMSNorm"),
    "apply_layernorm_1p": (" ", False),
    "add_bias_linear": (" ", False),
    "add_qkv_bias": ("*", False),
    "qk_layernorm": ("*", False),
    "position_embedding_type": ("*", "none"),
    "swiglu": ("-E", False),
    "gated_linear_unit": ("-E", False),
    "squared_relu": ("-E", True),
    "moe_router_score_function": ("E", "sigmoid"),
    "moe_router_enable_expert_bias": ("E", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridSettings:
    """One model: block patterns, MTP steps, and the sizes its blocks need (0 where none does)."""

    pattern: str
    mtp_pattern: str = ""
    mtp_num_layers: int = 0  # steps to run
    mtp_use_repeated_layer: bool = False  # every step uses the one stored layer
    vocab_size: int  # true size; the stored rows may be padded
    hidden_size: int
    num_attention_heads: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    mamba_num_groups: int = 0
    moe_router_topk: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_latent_size: int | None = None
    moe_shared_expert: bool = True
    layernorm_epsilon: float = 1e-5
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern + self.mtp_pattern) - set(BLOCKS))
        if unknown or not self.pattern:
            raise ValueError(f"pattern {self.pattern!r} / {self.mtp_pattern!r}: want only {BLOCKS!r}")
        if bool(self.mtp_pattern) != (self.mtp_num_layers > 0):
            raise ValueError(f"MTP pattern {self.mtp_pattern!r} with {self.mtp_num_layers} MTP layers")

    @property
    def mtp_stored_layers(self) -> int:
        """How many `mtp.layers.N` the checkpoint holds."""
        return min(self.mtp_num_layers, 1) if self.mtp_use_repeated_layer else self.mtp_num_layers

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> HybridSettings:
        """From a Nemotron-H `config.json` (pattern strings, or block lists with old or new names).

        A repeated MTP layer is stored once and run as often as the training run chose, which the
        config does not say: `dataclasses.replace(settings, mtp_num_layers=...,
        mtp_use_repeated_layer=True)` says it.
        """
        steps = int(config.get("num_nextn_predict_layers") or 0)
        pattern = _hf_pattern(config, "hybrid_override_pattern", listed="layers_block_type")
        mtp = _hf_pattern(config, "mtp_hybrid_override_pattern", listed="mtp_layers_block_type")
        mtp = mtp if steps else ""
        _refuse(config, _HF_FIXED, blocks=pattern + mtp)
        groups = _more_than_one(config.get("n_group"))
        return cls(
            pattern=pattern,
            mtp_pattern=mtp,
            mtp_num_layers=steps,
            mtp_use_repeated_layer=bool(config.get("mtp_use_repeated_layer")),
            vocab_size=int(config["vocab_size"]),
            moe_router_topk_scaling_factor=float(config.get("routed_scaling_factor") or 1.0),
            moe_router_num_groups=groups,
            moe_router_group_topk=int(config["topk_group"]) if groups else None,
            moe_latent_size=config.get("moe_latent_size") or None,
            moe_shared_expert=config.get("n_shared_experts", 1) not in (None, 0),
            layernorm_epsilon=float(config["layer_norm_epsilon"]),
            tied_embeddings=bool(config.get("tie_word_embeddings")),
            **_sizes(config, column=2, blocks=pattern + mtp),
        )

    @classmethod
    def from_megatron_args(cls, args: Mapping[str, Any]) -> HybridSettings:
        """From Megatron-LM's arguments (`vars(args)` of a checkpoint), e.g. pattern `M*ME-/*E/*E`.

        `untie_embeddings_and_output_weights` counts as given when absent, as in every released
        model; a tied checkpoint then fails its key check.
        """
        pattern, mtp, steps = _megatron_pattern(args)
        _refuse(args, _MEGATRON_FIXED, blocks=pattern + mtp)
        if args.get("group_query_attention") is False:
            # num_query_groups then keeps a default that means nothing
            args = {**args, "num_query_groups": args["num_attention_heads"]}
        groups = _more_than_one(args.get("moe_router_num_groups"))
        epsilon = args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))
        return cls(
            pattern=pattern,
            mtp_pattern=mtp,
            mtp_num_layers=steps,
            mtp_use_repeated_layer=bool(args.get("mtp_use_repeated_layer")),
            vocab_size=int(args.get("vocab_size") or args["padded_vocab_size"]),
            moe_router_topk_scaling_factor=float(args.get("moe_router_topk_scaling_factor") or 1.0),
            moe_router_num_groups=groups,
            moe_router_group_topk=int(args["moe_router_group_topk"]) if groups else None,
            moe_latent_size=args.get("moe_latent_size") or None,
            moe_shared_expert=bool(args.get("moe_shared_expert_intermediate_size", 1)),
            layernorm_epsilon=float(epsilon),
            tied_embeddings=not args.get("untie_embeddings_and_output_weights", True),
            **_sizes(args, column=3, blocks=pattern + mtp),
        )


def _hf_pattern(config: Mapping[str, Any], written: str, *, listed: str) -> str:
    """The pattern, from its string field or its list field; two that disagree are refused."""
    string = config.get(written) or ""
    names = config.get(listed) or ()
    if unknown := sorted(set(names) - set(_SYMBOL_OF)):
        raise ValueError(f"{listed}: unknown blocks {unknown}")
    spelled = "".join(_SYMBOL_OF[name] for name in names)
    if string and spelled and string != spelled:
        raise ValueError(f"{written} {string!r} and {listed} {spelled!r} disagree")
    return string or spelled


def _megatron_pattern(args: Mapping[str, Any]) -> tuple[str, str, int]:
    """(main pattern, MTP pattern, MTP steps): one `/` part per step, `|` marks pipeline stages."""
    main, *depths = str(args["hybrid_layer_pattern"]).split("/")
    if not depths and args.get("mtp_hybrid_override_pattern"):  # the spelling before 0.18
        depths = [args["mtp_hybrid_override_pattern"]] * int(args.get("mtp_num_layers") or 0)
    if len(set(depths)) > 1:
        raise ValueError(f"MTP patterns differ: {depths}")
    steps = args.get("mtp_num_layers")
    if steps is not None and int(steps) != len(depths):
        raise ValueError(f"mtp_num_layers {steps} but the pattern has {len(depths)} MTP parts")
    return main.replace("|", ""), depths[0] if depths else "", len(depths)


def _sizes(source: Mapping[str, Any], *, column: int, blocks: str) -> dict[str, Any]:
    """The fields of `_SIZES` that these blocks need; all missing ones are named at once."""
    rows = [row for row in _SIZES if set(row[1]) & set(blocks + " ")]
    missing = [row[column] for row in rows if source.get(row[column]) is None]
    if missing:
        raise ValueError(f"settings missing: {missing}")
    return {row[0]: int(source[row[column]]) for row in rows}


def _refuse(source: Mapping[str, Any], fixed: Mapping[str, tuple[str, object]], *, blocks: str) -> None:
    wrong = [
        f"{name}={source[name]!r} (only {wanted!r})"
        for name, (needed_by, wanted) in fixed.items()
        if set(needed_by) & set(blocks + " ") and source.get(name) not in (None, wanted)
    ]
    if wrong:
        raise ValueError(f"not supported here: {', '.join(wrong)}")


def _more_than_one(value: object) -> int | None:
    """A single router group means no groups."""
    return value if isinstance(value, int) and value > 1 else None
