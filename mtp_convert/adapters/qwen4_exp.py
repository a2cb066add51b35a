"""Qwen4-Exp (Qwen3.8-Flash-Next): residual streams with gated mixers in place of norms, delta nets, attention with an
indexer, experts, and embeddings of n-grams in some layers.

Names: transformers `modeling_qwen4_exp.py`; MTP, which transformers leaves out, as in mcore-bridge 1.6 and loaders.
No Megatron-Core release has the model: blocks that it has are named as there, the others as in mcore-bridge's modules.
A release stores n-gram tables in equal shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from math import isqrt
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import _qwen as q
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, number, optional, silent_depth_field
from mtp_convert.adapters._gpt import TOWER
from mtp_convert.adapters.blocks.table import block_of, table
from mtp_convert.mapping.family import Config, ConfigError, Family
from mtp_convert.mapping.ops import Grouped
from mtp_convert.mapping.rules import Block, Extra, Param, Placed, Row, Rule, rule

COLUMNS = "hf native megatron"
# s streams of size H   r rank of a mixer   X heads of the indexer, queries and key   D its head dim
# P size of an n-gram embedding   N n-gram size   G n-gram heads   W conv width   o one
MIXER = """
    hc_norm  s*H    hc_norm.weight                =  =
    down     r,s*H  input_mix_weight_down.weight  =  =
    up       s*H,r  input_mix_weight_up.weight    =  =
"""
INJECT = "inject  s,s*H  block_inject_weight.weight  =  ="
INDEXER = """
    qk      X*D,H  index_qk_proj.weight  =  =
    q_norm  D      q_layernorm.weight    =  =
    k_norm  D      k_layernorm.weight    =  =
"""
NGRAM = """
    key          s*H,P    key_proj.weight                        =  =
    value        H,P      value_proj.weight                      =  =
    norm_key     s*H      norm_key.weight                        =  =
    norm_query   s*H      norm_query.weight                      =  =
    norm_conv    s*H      norm_conv.weight                       =  =
    conv         s*H,o,W  conv1d.weight                          =  =
    multipliers  N        ple_embedding.layer_multipliers        =  =
    offsets      G        ple_embedding.ngram_heads_offsets      =  =
    sizes        G        ple_embedding.ngram_heads_vocab_sizes  =  =
"""
FUSION = """
    enorm   H     pre_fc_norm_embedding.weight  enorm.weight   =
    hnorm   s*H   pre_fc_norm_hidden.weight     hnorm.weight   =
    e_proj  H/,H  fc_embedding.weight           e_proj.weight  =
    h_proj  H/,H  fc_hidden.weight              h_proj.weight  =
"""


@dataclass(frozen=True, slots=True)
class Dims:
    """Everything that fixes the names and shapes.

    linear: per decoder layer, whether it is a delta net. sizes: the letters of the tables. tables: by layer, the rows
    of every shard of its n-gram table.
    """

    H: int
    V: int
    linear: tuple[bool, ...]
    depths: int
    tied: bool
    attention: b.Attention
    delta: b.DeltaNet | None
    moe: b.Moe
    sizes: Mapping[str, int]
    tables: Mapping[int, tuple[int, ...]]


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json."""
    attention = q.attention(config, gated=True)
    linear = q.linear_layers(config, "indexed_attention")
    layers = _ngrams(config)
    heads = (number(config, "ngram_size", 8) - 1) * number(config, "heads_per_ngram", 64) if layers else 0
    width = (optional(config, "ple_embed_dim") or attention.H) if layers else 0
    if layers and (not heads or width % heads):
        raise ConfigError(f"ple_embed_dim {width} is no multiple of the {heads} n-gram heads")
    sizes = {
        "H": attention.H,
        "s": number(config, "hc_count", 1024),
        "r": number(config, "hc_lowrank"),
        "X": number(config, "indexer_n_heads") + number(config, "indexer_kv_heads"),
        "D": number(config, "indexer_head_dim"),
        "P": width,
        "N": optional(config, "ngram_size"),
        "G": heads,
        "W": optional(config, "ple_conv_kernel_size"),
        "o": 1,
    }
    return Dims(
        H=attention.H,
        V=number(config, "vocab_size"),
        linear=linear,
        depths=depths,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention=attention,
        delta=replace(q.delta_net(config, attention.H), centred=False) if any(linear) else None,
        moe=q.gated_moe(config, attention.H),
        sizes=sizes,
        tables={i: shards(config, index, heads) for index, i in enumerate(layers)},
    )


def _ngrams(config: Config) -> list[int]:
    """The layers with n-gram embeddings, from 0."""
    found = config.get("ple_layer_ids") or []
    layers = number(config, "num_hidden_layers", MOST)
    if not isinstance(found, list) or not all(isinstance(i, int) and 0 < i <= layers for i in found):
        raise ConfigError(f"ple_layer_ids must be layers from 1 to {layers}, got {found!r}")
    return sorted(i - 1 for i in set(found))


def shards(config: Config, index: int, heads: int) -> tuple[int, ...]:
    """Rows of every shard of the `index`-th n-gram table; every head of every table has a prime number of its own."""
    base, parts = number(config, "ngram_vocab_size_base", 2**28), number(config, "split_ngram_parts", MOST)
    multiple = number(config, "make_ngram_vocab_size_divisible_by")
    rows = sum(primes(base, (index + 1) * heads)[index * heads :])
    rows = -(-rows // multiple) * multiple
    share = -(-rows // parts)
    found = tuple(min(share, rows - at) for at in range(0, rows, share))
    if len(found) < parts:
        raise ConfigError(f"split_ngram_parts {parts} leaves shards of {rows} rows empty")
    return found


@cache
def primes(start: int, number_of: int) -> tuple[int, ...]:
    """The first primes from `start`, which is above 2."""
    odd = count(start | 1, 2)
    return tuple(islice((n for n in odd if all(n % d for d in range(3, isqrt(n) + 1, 2))), number_of))


def without(block: Block, param: str, module: str = "") -> Block:
    """The block without a norm, and without the state of the module that holds it."""
    rows = {
        layout: tuple(
            row
            for row in found
            if not (isinstance(row, Rule) and row.params == (param,))
            and not (isinstance(row, Extra) and module and row.key == f"{module}._extra_state")
        )
        for layout, found in block.rows.items()
    }
    return Block(tuple(p for p in block.params if p.name != param), rows, block.domains)


def mixer(d: Dims, name: str, **trees: str) -> Block:
    """The gates that make one stream of several."""
    return stored(d, MIXER, name, "input_mix_weight_down", "input_mix_weight_up", **trees)


def injecting(d: Dims, name: str) -> Block:
    """The same with those that bring the block's output back to all streams."""
    return stored(d, MIXER + INJECT, name, "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight")


def stored(d: Dims, text: str, name: str, *modules: str, **trees: str) -> Block:
    """A table below the module `name`, with the states of its modules; `trees`: its name in other layouts."""
    prefixes = {**dict.fromkeys(COLUMNS.split(), name), **trees}
    block = block_of([line.under("", **prefixes) for line in table(COLUMNS, text)], d.sizes)
    megatron = (*block.rows["megatron"], *b.te(*(name + module for module in modules)))
    return replace(block, rows={**block.rows, "megatron": megatron})


def ngram(d: Dims, rows_of_shards: tuple[int, ...]) -> Block:
    """Embeddings of n-grams; transformers and Megatron hold the table as one."""
    block = stored(d, NGRAM, "ple.", "key_proj", "value_proj")
    name, shape = "ple.ple_embedding.ngram_embedding", d.sizes["P"] // d.sizes["G"]
    tables = [f"table.{part}" for part in range(len(rows_of_shards))]
    params = [Param(t, (rows, shape), cut=0) for t, rows in zip(tables, rows_of_shards, strict=True)]
    one: tuple[Row, ...] = (rule(f"{name}.weight", *tables, op=Grouped(1)),)  # ranks cut the table, not its shards
    apart = tuple(rule(f"{name}.shard_{part}.weight", t) for part, t in enumerate(tables))
    more = {"hf": apart, "native": one, "megatron": one}
    return Block((*block.params, *params), {layout: rows + more[layout] for layout, rows in block.rows.items()})


def layer(d: Dims, *, linear: bool, mtp: bool = False, rows_of_shards: tuple[int, ...] = ()) -> b.Layer:
    """The blocks of a decoder layer."""
    word = "mtp_experts" if mtp else "experts"
    moe = b.llama_moe(d.moe, shared="shared_expert", word=word)
    found = {
        "mlp": without(moe, "norm", "pre_mlp_layernorm"),
        "attention_mixer": injecting(d, "attn_hyper_connection."),
        "mlp_mixer": injecting(d, "mlp_hyper_connection."),
    }
    if rows_of_shards:
        found["ngram"] = ngram(d, rows_of_shards)
    if linear:
        assert d.delta is not None
        return {**found, "attention": without(b.qwen_delta_net(d.delta, by_head=False), "norm")}
    tree = "self_attn.indexer."
    indexer = stored(d, INDEXER, "self_attention.indexer.", "index_qk_proj", hf=tree, native=tree)
    return {**found, "attention": without(b.llama_attention(d.attention), "norm"), "indexer": indexer}


def ends(d: Dims) -> Block:
    """Embedding and head, and between them a mixer in the place of a norm."""
    plain = without(b.ends(d.H, d.V, tied=d.tied), "final_norm", "decoder.{final_norm}")
    name = "hyper_connection_mixer."
    between = mixer(d, f"decoder.{name}", hf=f"{{trunk}}{name}", native=f"model.{name}")
    rows = {layout: found + between.rows[layout] for layout, found in plain.rows.items()}
    return Block((*plain.params, *between.params), rows)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    layers = [layer(d, linear=x, rows_of_shards=d.tables.get(i, ())) for i, x in enumerate(d.linear)]
    depth = b.Depth(
        stored(d, FUSION, "", "enorm", "e_proj", "h_proj"),
        layer(d, linear=False, mtp=True),
        mixer(d, "hyper_connection_mixer."),
    )
    inner = "mtp.layers.{k}."
    at = inner if d.depths > 1 else "mtp."
    yield from b.places(ends(d), layers, depth, depths=d.depths, hf=b.HfPrefixes(fusion=at, inner=inner, final=at))


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Megatron-LM argument names of what it knows; `steps` MTP depths run, over one stored depth when `repeated`."""
    d = dims(config, 0)
    return {
        **args.model_args(config, layers=len(d.linear), H=d.H, V=d.V, tied=d.tied),
        **args.gpt_args({"partial_rotary_factor": 0.25, **config}),
        **args.attention_args(d.attention),
        **args.delta_args(d.delta, d.linear),
        **args.moe_args(config, d.moe, score="softmax"),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "apply_layernorm_1p": True,
    }


FAMILY = Family(
    name="qwen4_exp",
    model_types=("qwen4_exp_text",),
    title="Qwen4-Exp / Qwen3.8-Flash-Next (hyper-connections, gated delta net, indexer, n-gram embeddings)",
    dims=dims,
    places=places,
    choices=b.choices("wrapper", experts=("stacked", "split"), mtp_experts=("stacked", "split")),
    depths=silent_depth_field("mtp_num_hidden_layers"),
    megatron_args=megatron_args,
    forms=b.MEGATRON_FORMS,
    nested=q.NESTED,
    megatron_since=(0, 19),
    unproven="Megatron-Core has neither these hyper-connections nor n-gram embeddings",
    notes=(
        "Megatron names are ours: Megatron-Core's where it has the block, else those of mcore-bridge's modules (which "
        "itself stores the projections of a delta net by key head).",
        "e_proj and h_proj are square matrices, hnorm covers all streams, a mixer takes the place of the final norm.",
        "n-gram tables are read in high precision: one float8 scale for all shards of a table is not.",
        TOWER,
        q.SEVERAL,
    ),
)
