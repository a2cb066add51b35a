"""MiniMax-M3's language model: grouped-query attention, sparse in most layers, experts, a full layer per MTP depth.

Sparse layers have an indexer, which Megatron-Bridge keeps beside the language model. All norms count their weight from
0, on both sides. transformers has names of its own where it saves the language model alone.
Names: the released checkpoints, as vLLM reads them; transformers `modeling_minimax_m3_vl.py` and its conversion;
Megatron-Bridge 0.6 `MiniMaxM3Bridge`, which has no MTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _gpt as gpt
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, either, flags, number, optional
from mtp_convert.adapters.blocks.table import block_of, table
from mtp_convert.mapping.family import Config, ConfigError, DepthField, Family, Released
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Placed, Row, only, rule

INDEXED = {"minimax_m3_sparse": True, "full_attention": False, 1: True, 0: False}
EXPERTS = {"sparse": True, "dense": False, 1: True, 0: False}
LAYER = "{wrapper}model.layers.{i}."
DEPTH = "{wrapper}model.mtp.layers.{k}."
MODULES = "num_mtp_modules"

# H hidden   X indexer heads   Y indexer head dim
INDEXER = table(
    "released native megatron",
    """
    q       X*Y,H  index_q_proj.weight  indexer.q_proj.weight  q_proj.weight
    k       Y,H    index_k_proj.weight  indexer.k_proj.weight  k_proj.weight
    q_norm  Y      index_q_norm.weight  indexer.q_norm.weight  q_norm.weight
    k_norm  Y      index_k_norm.weight  indexer.k_norm.weight  k_norm.weight
    """,
    released="self_attn.",
    native="self_attn.",
)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention, its indexer, and per decoder layer whether it has one; MTP layers always do."""

    heads: b.Attention
    indexer: b.Indexer
    indexed: tuple[bool, ...]


Dims = gpt.Dims[Attention]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it."""
    if config.get("attention_output_gate"):
        raise ConfigError("attention_output_gate: no released model of this class has one")
    H, layers = number(config, "hidden_size"), number(config, "num_hidden_layers", MOST)
    sparse = layers_of(config, ("mlp_layer_types", "moe_layer_freq"), EXPERTS) or (True,) * layers
    attention = gpt.gqa(config, qk_norm=bool(config.get("use_qk_norm", True)))
    width = number(config, "intermediate_size")
    shared = optional(config, "shared_intermediate_size")
    moe = b.Moe(
        H,
        E=either(config, "num_local_experts", "num_experts", most=MOST),
        I=width,
        S=shared * (optional(config, "n_shared_experts", MOST) or 1),
        gated=True,
        router_bias=bool(config.get("use_routing_bias", True)),
        wide_router=True,
    )
    dense = {**config, "intermediate_size": number(config, "dense_intermediate_size")}
    return gpt.dims(dense, depths, attention=indexed(config, attention, layers), sparse=sparse, moe=moe)


def indexed(config: Config, attention: b.Attention, layers: int) -> Attention:
    """Which layers are sparse, and the sizes of their indexers: fields of their own, or a section of the config."""
    section = config.get("sparse_attention_config") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"sparse_attention_config must be an object, got {section!r}")
    merged = {"num_hidden_layers": layers, **section, **config}
    found = layers_of(merged, ("layer_types", "sparse_attention_freq"), INDEXED) or (False,) * layers
    valued = layers_of(merged, ("sparse_disable_index_value",), {1: False, 0: True}) or (False,) * layers
    if any(x and v for x, v in zip(found, valued, strict=True)):
        raise ConfigError("sparse_disable_index_value: no released model of this class has an indexer with values")
    heads = either(merged, "index_n_heads", "sparse_num_index_heads")
    return Attention(attention, b.Indexer(heads, either(merged, "index_head_dim", "sparse_index_dim")), found)


def layers_of(config: Config, fields: tuple[str, ...], meaning: dict[Any, bool]) -> tuple[bool, ...] | None:
    """What the first of the fields that is there says of every layer."""
    layers = number(config, "num_hidden_layers", MOST)
    found = (flags(config, field, layers, meaning) for field in fields)
    return next((listed for listed in found if listed is not None), None)


def spelled(block: Block, *released: Row) -> Block:
    """The block as it was released, or as transformers holds it in memory."""
    rows = (*only(*released, names="released"), *only(*block.rows["native"], names="transformers"))
    return Block(block.params, {**block.rows, "hf": rows}, block.domains)


def fused_first(block: Block, module: str, params: tuple[str, ...]) -> Block:
    """The block with gate and up projection as one tensor in the native tree."""
    apart = {(p,) for p in params}
    rows = [row for row in block.rows["native"] if getattr(row, "params", None) not in apart]
    rows.append(rule(f"{module}.gate_up_proj.weight", *params, op=Concat(0)))
    return Block(block.params, {**block.rows, "native": tuple(rows)}, block.domains)


def dense_block(d: b.Mlp) -> Block:
    """Dense MLP."""
    llama = b.llama_mlp(d)
    return spelled(fused_first(llama, "mlp", d.first), *llama.rows["hf"])


def moe_block(d: b.Moe) -> Block:
    """Experts, in the names of Mixtral."""
    first = tuple(f"shared.{p}" for p in d.first)
    llama = b.llama_moe(d)
    block = fused_first(llama, "mlp.shared_experts", first) if d.S else llama
    module, names = "block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"}
    released = [
        rule("post_attention_layernorm.weight", "norm"),
        rule(f"{module}.gate.weight", "router"),
        *(rule(f"{module}.experts.{{e}}.{name}.weight", f"experts.{{e}}.{p}") for name, p in names.items()),
    ]
    if d.router_bias:
        released.append(rule(f"{module}.e_score_correction_bias", "router_bias"))
    if d.S:
        released += [rule(f"{module}.shared_experts.{p}_proj.weight", f"shared.{p}") for p in (*d.first, "down")]
    return spelled(block, *released)


def indexer_block(d: Dims) -> Block:
    """The indexer of a sparse layer; Megatron never cuts it."""
    x = d.attention.indexer
    block = block_of(INDEXER, {"H": d.H, "X": x.X, "Y": x.Y})
    return spelled(Block(block.params, {n: block.rows[n] for n in ("native", "megatron")}), *block.rows["released"])


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout; indexers behind the layers, as in Megatron-Bridge."""
    attention, dense, indexer = b.llama_attention(d.attention.heads), dense_block(d.mlp), indexer_block(d)
    experts = moe_block(d.moe) if d.moe else None
    layers = [{"attention": attention, "mlp": experts if s and experts else dense} for s in d.sparse]
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    ends = b.ends(d.H, d.V, tied=d.tied, **{part: "{wrapper}" + name for part, name in names.items()})
    inner = f"{DEPTH}transformer_layer."
    depth = b.Depth(b.hf_fusion(d.H), {"attention": attention, "mlp": experts or dense}, b.mtp_final_norm(d.H))
    hf = b.HfPrefixes(LAYER, fusion=DEPTH, inner=inner, final=DEPTH)
    yield from b.places(ends, layers, depth, depths=d.depths, hf=hf)
    decoder = {"hf": LAYER, "native": b.NATIVE.layer, "megatron": "lightning_indexers.{i}."}
    for i in (i for i, x in enumerate(d.attention.indexed) if x):
        yield Placed(indexer, "layers.{i}.indexer.", decoder, {"i": i})
    mtp = {"hf": inner, "native": b.NATIVE.inner, "megatron": f"{b.MEGATRON.inner}lightning_indexer."}
    for k in range(d.depths):
        yield Placed(indexer, "mtp.{k}.indexer.", mtp, {"k": k})


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names; Megatron attends to all tokens."""
    d = dims(config, 0)
    heads = d.attention.heads
    rotary = {"partial_rotary_factor": optional(config, "rotary_dim") / heads.D} if config.get("rotary_dim") else {}
    found = gpt.megatron_args({**rotary, **config}, d, steps, repeated=repeated, attention=args.attention_args(heads))
    return {
        **found,
        "ffn_hidden_size": d.mlp.F,
        "apply_layernorm_1p": True,
        "swiglu": False,
        "quick_geglu": True,
        "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
        "glu_linear_offset": 1.0,
    }


def depth_count() -> DepthField:
    """Releases may declare modules that they do not store: what is stored counts."""

    def declared(config: Config) -> int:
        return optional(config, MODULES, MOST)

    def corrected(config: Config, depths: int) -> dict[str, Any]:
        return {**config, MODULES: depths} if depths else dict(config)

    return DepthField(declared, corrected, MODULES, counts=lambda _: False)


FAMILY = Family(
    name="minimax_m3",
    model_types=("minimax_m3_vl_text", "minimax_m3_text", "minimax_m3"),
    title="MiniMax-M3's language model (sparse attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {"wrapper": ("", "language_model."), "names": ("released", "transformers")},
        "megatron": b.megatron_words(
            "wrapper", "attention_norm", "mlp_norm", "moe_norm", "final_norm", inner="transformer_layer"
        ),
        "native": {},
    },
    variants={"hf": {"transformers": {"names": "transformers"}}},
    depths=depth_count(),
    megatron_args=megatron_args,
    nested={"wrapper": "language_model."},
    wrappers=("minimax_m3_vl",),
    forms=b.MEGATRON_FORMS,
    megatron_since=(0, 15),
    released=Released((0, 1), ("bf16", "fp8")),
    unproven="Megatron-Core has indexers for latent attention alone",
    notes=(
        "Releases may declare MTP modules without storing them: what is stored counts, and the config stays.",
        "Indexers are lightning_indexers.{i} in Megatron, as Megatron-Bridge stores them; those of MTP layers are "
        "lightning_indexer inside the layer, a name of ours.",
        "gate and up projections are one tensor each in the native tree, and where transformers saves the language "
        "model alone.",
        gpt.TOWER,
        gpt.COLUMNS,
        gpt.KEPT_ROUTER,
    ),
)
