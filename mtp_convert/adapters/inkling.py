"""Inkling: window and full attention with relative positions and short convolutions, MoE with scored shared experts.

The release interleaves the rows of gate and up projections, and projects [hidden | embedding] in its MTP layers. These
have no norm behind them; one norm for all depths may stand between them (`chain_norm`).
Names: the released checkpoint, transformers `modeling_inkling.py`. Megatron has no such model: its names are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, flags, number, optional
from mtp_convert.adapters.blocks.table import Line, block_of, params_of, rows_of, table
from mtp_convert.mapping.family import Config, ConfigError, DepthField, Family
from mtp_convert.mapping.ops import Grouped
from mtp_convert.mapping.rules import Block, Param, Placed, Row, rule

WINDOW = {"hybrid_sliding": True, "hybrid": False}
EXPERTS = {"sparse": True, "dense": False}
FULL_EVERY = 6  # where the config does not say which layers have a window
COLUMNS = "hf native megatron"
KEPT = ("k_conv", "v_conv", "out_conv", "router_scale")  # high precision

# H hidden   Q query heads   K key/value heads   D head dim   R relative channels   X distances   W kernel width
GROUPED_QUERY = table(
    "hf native",
    """
    norm    H      attn_norm.weight    input_layernorm.weight
    q       Q*D,H  attn.wq_du.weight   self_attn.q_proj.weight
    k       K*D,H  attn.wk_dv.weight   self_attn.k_proj.weight
    v       K*D,H  attn.wv_dv.weight   self_attn.v_proj.weight
    o       H,Q*D  attn.wo_ud.weight   self_attn.o_proj.weight
    q_norm  D      attn.q_norm.weight  self_attn.q_norm.weight
    k_norm  D      attn.k_norm.weight  self_attn.k_norm.weight
    """,
)
ATTENTION = table(
    COLUMNS,
    """
    relative  Q*R,H    attn.wr_du.weight          self_attn.r_proj.weight          self_attention.linear_r.weight
    distance  R,X      attn.rel_logits_proj.proj  self_attn.rel_logits_proj.proj   self_attention.rel_logits_proj
    k_conv    K*D,1,W  attn.k_sconv.weight        self_attn.k_sconv.conv1d.weight  self_attention.k_sconv.weight
    v_conv    K*D,1,W  attn.v_sconv.weight        self_attn.v_sconv.conv1d.weight  self_attention.v_sconv.weight
    out_conv  H,1,W    attn_sconv.weight          attn_sconv.conv1d.weight         attn_sconv.weight
    """,
)
DENSE = table(
    COLUMNS,
    """
    scale     1      mlp.global_scale  =                        mlp.global_scale
    out_conv  H,1,W  mlp_sconv.weight  mlp_sconv.conv1d.weight  mlp_sconv.weight
    """,
)
SPARSE = table(
    COLUMNS,
    """
    router_scale  1      mlp.gate.global_scale  =                        mlp.router.global_scale
    out_conv      H,1,W  mlp_sconv.weight       mlp_sconv.conv1d.weight  mlp_sconv.weight
    """,
)
EMBEDDING = table(
    COLUMNS,
    """
    embedding_norm  H  model.llm.embed_norm.weight  model.embed_tokens.embed_norm.weight  embedding.embed_norm.weight
    """,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of attention. relative: channels of a head's relative state, and the distances that it weighs."""

    attention: b.Attention
    relative: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    sliding, sparse: per decoder layer, whether its attention has a window, and its MLP experts. mtp_sliding: the same
    per MTP depth. chained: whether there is a norm between depths. W: kernel width of the short convolutions. shared:
    how many shared experts.
    """

    H: int
    V: int
    W: int
    sliding: tuple[bool, ...]
    sparse: tuple[bool, ...]
    mtp_sliding: tuple[bool, ...]
    chained: bool
    depths: int
    full: Kind
    window: Kind
    mlp: b.Mlp
    moe: b.Moe | None

    @property
    def tied(self) -> bool:
        """Embedding and head are always apart."""
        return False


def sections(config: Config) -> tuple[Config, Config]:
    """What describes the language model, and its MTP layers: in the release, sections of the config."""
    text, mtp = config.get("text_config", config), config.get("mtp_config")
    if mtp is None:
        renamed = {"num_nextn_predict_layers": "num_mtp_layers", "local_layer_ids": "mtp_local_layer_ids"}
        mtp = {**text, **{released: text.get(own) for released, own in renamed.items()}}
    return text, mtp


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it."""
    text, mtp = sections(config)
    H, layers = number(text, "hidden_size"), number(text, "num_hidden_layers", MOST)
    usual = [i for i in range(layers) if (i + 1) % FULL_EVERY]
    sliding = flags(text, "layer_types", layers, WINDOW) or among(text.get("local_layer_ids", usual), layers)
    first_sparse = optional(text, "dense_mlp_idx", MOST)
    sparse = flags(text, "mlp_layer_types", layers, EXPERTS) or tuple(i >= first_sparse for i in range(layers))
    inner = number(text, "intermediate_size")
    dense = optional(text, "dense_intermediate_size")  # where it is given, the other size is the experts'
    return Dims(
        H=H,
        V=number(text, "vocab_size"),
        W=next((number(text, f) for f in ("sconv_kernel_size", "conv_kernel_size") if text.get(f)), 4),
        sliding=sliding,
        sparse=sparse,
        mtp_sliding=among(mtp.get("local_layer_ids") or [], max(depths, 1)),
        chained=bool(mtp.get("chain_hidden_post_norm")),
        depths=depths,
        full=kind(text, "", "rel_extent"),
        window=kind(text, "swa_", "sliding_window_size"),
        mlp=b.Mlp(H, dense or inner, gated=True),
        moe=moe(text, inner if dense else number(text, "moe_intermediate_size")) if any(sparse) else None,
    )


def among(numbers: object, count: int) -> tuple[bool, ...]:
    """Which of the first `count` layers are listed."""
    if not isinstance(numbers, list):
        raise ConfigError(f"local_layer_ids must be a list, got {numbers!r}")
    return tuple(i in numbers for i in range(count))


def kind(text: Config, prefix: str, extent: str) -> Kind:
    """Attention whose fields have a prefix; `extent`: the field that counts distances."""
    heads, groups = number(text, f"{prefix}num_attention_heads"), number(text, f"{prefix}num_key_value_heads")
    if heads % groups:
        raise ConfigError(f"{prefix}num_attention_heads {heads} is no multiple of {groups} key/value heads")
    found = b.Attention(number(text, "hidden_size"), heads, groups, number(text, f"{prefix}head_dim"), qk_norm=True)
    return Kind(found, (number(text, "d_rel"), number(text, extent)))


def moe(text: Config, inner: int) -> b.Moe:
    """Gated experts; the router scores the shared ones too."""
    shared = optional(text, "n_shared_experts", MOST)
    H, E = number(text, "hidden_size"), number(text, "n_routed_experts", MOST)
    return b.Moe(H, E=E, I=inner, S=0, gated=True, scored=shared)


def joined(block: Block, lines: Sequence[Line], sizes: Mapping[str, int], **rows: Sequence[Row]) -> Block:
    """Megatron's block with Hugging Face `rows` for its params, and with params of this model behind them."""
    own = params_of(lines, sizes, high_precision=KEPT, unquantised=["relative"])
    base = {"megatron": block.rows["megatron"], **rows}
    return Block(
        (*block.params, *own),
        {layout: (*found, *rows_of(lines, layout)) for layout, found in base.items()},
        block.domains,
    )


def attention(d: Dims, kind: Kind) -> Block:
    """Attention with relative positions; keys, values and the output pass short convolutions."""
    a = kind.attention
    sizes = {"H": d.H, "Q": a.Q, "K": a.K, "D": a.D, "R": kind.relative[0], "X": kind.relative[1], "W": d.W, "1": 1}
    hf, native = (rows_of(GROUPED_QUERY, layout) for layout in ("hf", "native"))
    return joined(b.attention(a), ATTENTION, sizes, hf=hf, native=native)


def mlp(d: Dims) -> Block:
    """Dense MLP with a scale; rows of gate and up alternate in the release."""
    llama = b.llama_mlp(d.mlp)
    hf = (
        rule("mlp_norm.weight", "norm"),
        rule("mlp.w13_dn.weight", "gate", "up", op=Grouped(d.mlp.F)),
        rule("mlp.w2_md.weight", "down"),
    )
    return joined(llama, DENSE, {"H": d.H, "W": d.W, "1": 1}, hf=hf, native=llama.rows["native"])


def experts(d: Dims, m: b.Moe) -> Block:
    """Experts, and a stack of shared ones; rows of gate and up alternate in the release."""
    llama = b.llama_moe(m)
    first = ("experts.{e}.gate", "experts.{e}.up")
    hf = [
        rule("mlp_norm.weight", "norm"),
        rule("mlp.gate.weight", "router"),
        rule("mlp.gate.bias", "router_bias"),
        rule("mlp.experts.w13_weight", *first, op=Grouped(m.I), over=("e",)),
        rule("mlp.experts.w2_weight", "experts.{e}.down", over=("e",)),
    ]
    block = joined(llama, SPARSE, {"H": d.H, "W": d.W, "1": 1}, hf=hf, native=llama.rows["native"])
    return with_shared(block, m) if m.scored else block


def with_shared(block: Block, m: b.Moe) -> Block:
    """Shared experts beside the others: a list of MLPs in Megatron, stacked elsewhere."""
    first, module = ("shared.{s}.gate", "shared.{s}.up"), "mlp.shared_experts"
    params = [*(Param(p, (m.I, m.H)) for p in first), Param("shared.{s}.down", (m.H, m.I))]
    stacked = ("s",)
    rows: dict[str, tuple[Row, ...]] = {
        "hf": (
            rule(f"{module}.shared_w13_weight", *first, op=Grouped(m.I), over=stacked),
            rule(f"{module}.shared_w2_weight", "shared.{s}.down", over=stacked),
        ),
        "native": tuple(rule(f"{module}.{p}_proj", f"shared.{{s}}.{p}", over=stacked) for p in ("gate", "up", "down")),
        "megatron": (
            *b.halves(f"{module}.{{s}}.linear_fc1.weight", *first),
            rule(f"{module}.{{s}}.linear_fc2.weight", "shared.{s}.down"),
        ),
    }
    merged = {layout: (*found, *rows[layout]) for layout, found in block.rows.items()}
    return Block((*block.params, *params), merged, {**block.domains, "s": range(m.scored)})


def ends(d: Dims) -> Block:
    """Embedding with a norm of its own, final norm, head."""
    names = {"embedding": "model.llm.embed.weight", "norm": "model.llm.norm.weight", "head": "model.llm.unembed.weight"}
    main = b.ends(d.H, d.V, tied=False, **names)
    rows = {layout: (*found, *rows_of(EMBEDDING, layout)) for layout, found in main.rows.items()}
    return Block((*main.params, *params_of(EMBEDDING, {"H": d.H})), rows)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    attentions = {True: attention(d, d.window), False: attention(d, d.full)}
    dense = mlp(d)
    mlps = {False: dense, True: experts(d, d.moe) if d.moe else dense}
    layers = [{"attention": attentions[s], "mlp": mlps[e]} for s, e in zip(d.sliding, d.sparse, strict=True)]
    fusion = b.hf_fusion(d.H, "embed_norm", "hidden_norm", "input_proj", hidden_first=True)
    nothing = Block((), {layout: () for layout in ("hf", "native", "megatron")})
    depths = [b.Depth(fusion, {"attention": attentions[s], "mlp": dense}, nothing) for s in d.mtp_sliding]
    at = "model.mtp.layers.{k}."
    hf = b.HfPrefixes("model.llm.layers.{i}.", at, at + "transformer_block.", at)
    yield from b.places(ends(d), layers, depths, depths=d.depths, hf=hf)
    if d.depths and d.chained:
        chain = table(COLUMNS, "chain_norm H chain_norm.weight = =")
        prefixes = {"hf": "model.mtp.", "native": "mtp.", "megatron": "{wrapper}mtp."}
        yield Placed(block_of(chain, {"H": d.H}), "mtp.", prefixes)


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; heads are those of the full-attention layers."""
    d, (text, _) = dims(config, 0), sections(config)
    return {
        **args.model_args(text, layers=len(d.sliding), H=d.H, V=d.V, tied=False),
        **args.gpt_args(text),
        **args.attention_args(d.full.attention),
        **args.moe_args({**text, "routed_scaling_factor": text.get("route_scale")}, d.moe),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "ffn_hidden_size": d.mlp.F,
        "position_embedding_type": "none",
        "use_rotary_position_embeddings": False,
        "moe_layer_freq": [int(e) for e in d.sparse],
    }


def declared(config: Config) -> int:
    """MTP depths, where the release or transformers counts them."""
    return optional(sections(config)[1], "num_nextn_predict_layers", MOST)


def corrected(config: Config, depths: int) -> dict[str, Any]:
    """A config that agrees with another number of depths."""
    if isinstance(config.get("mtp_config"), dict):
        return {**config, "mtp_config": {**config["mtp_config"], "num_nextn_predict_layers": depths}}
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": {**config["text_config"], "num_mtp_layers": depths}}
    return {**config, "num_mtp_layers": depths}


FAMILY = Family(
    name="inkling",
    model_types=("inkling_mm_model", "inkling_text"),
    title="Inkling (relative positions, short convolutions, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {},
        "megatron": b.megatron_words(
            "wrapper", "attention_norm", "mlp_norm", "moe_norm", "final_norm", inner="transformer_layer"
        ),
        "native": {},
    },
    depths=DepthField(declared, corrected, others=("mtp_config",)),
    megatron_args=megatron_args,
    megatron_since=(0, 12),
    unproven="Megatron-Core has neither these relative positions nor convolutions of keys and values",
    notes=(
        "Megatron has no such model: names are those that it gives the same blocks elsewhere, or ours.",
        "input_proj columns are [hidden | embedding] in the release, [embedding | hidden] in Megatron: halves swap.",
        "MTP layers have no norm behind them; one norm for all depths (chain_norm) may stand between them.",
        "Rows of w13 tensors alternate between gate and up; Megatron stores gate above up.",
        "Convolutions, router bias and router scale keep their stored dtype under --dtype.",
    ),
)
