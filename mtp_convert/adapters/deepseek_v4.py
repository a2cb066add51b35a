"""DeepSeek-V4 (Flash, Flash-Base, Pro): hyper-connections, compressed sparse attention, hash-routed layers, MTP.

The names, and the letters of the shapes, are in `_v4_tables`. Sources: the released checkpoints, transformers
`modeling_deepseek_v4.py`, NeMo AutoModel 0.7, Megatron-Core's development branch (no release has the model yet).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_convert.adapters import _arguments as args
from mtp_convert.adapters import blocks as b
from mtp_convert.adapters._config import MOST, number, optional, rope_scaling
from mtp_convert.adapters._v4_config import DEPTHS, FIELDS, read_hashed, read_ratios
from mtp_convert.adapters._v4_tables import (
    ATTENTION,
    COLUMNS,
    COMPRESSOR,
    COMPRESSOR_AT,
    FUSION,
    HEAD,
    INDEXER,
    INDEXER_AT,
    INDEXER_KEYS_AT,
    ROUTER,
)
from mtp_convert.adapters.blocks.table import Line, params_of, rows_of, table
from mtp_convert.mapping.family import Config, ConfigError, Family, Released
from mtp_convert.mapping.ops import Concat, Permute
from mtp_convert.mapping.rules import Block, Copy, Extra, Placed, Row, Rule, only, rule

SPARSE_RATIO = 4  # the ratio of a layer with overlapping windows and an indexer; layers of another ratio have neither


@dataclass(frozen=True)
class Dims:
    """Everything that fixes the names and shapes: sizes by letter, and what makes layers differ.

    ratios: compression of the decoder layers, 0 for none; hashed: layers whose router is a table of token ids;
    mtp_ratios: compression of the MTP depths, none for those that the config does not mention.
    """

    sizes: Mapping[str, int]
    ratios: tuple[int, ...]
    hashed: tuple[bool, ...]
    mtp_ratios: tuple[int, ...]
    depths: int
    tied: bool


def dims(config: Config, depths: int) -> Dims:
    """Read a config.json as released, or as transformers writes it."""
    n = {letter: number(config, name) for letter, name in FIELDS.items()}
    if n["Q"] * n["D"] % n["G"]:
        raise ConfigError(f"o_groups {n['G']} does not divide {n['Q']} heads of {n['D']}")
    n |= {"J": n["Q"] * n["D"] // n["G"], "S": n["I"] * optional(config, "n_shared_experts", MOST), "1": 1}
    n["M"] = (2 + n["s"]) * n["s"]
    layers = number(config, "num_hidden_layers", MOST)
    ratios = read_ratios(config, layers)
    return Dims(
        n,
        tuple(ratios[:layers]),
        tuple(read_hashed(config, layers)),
        tuple(ratios[layers:]),
        depths,
        bool(config.get("tie_word_embeddings", False)),
    )


MATRIX = ".weight"  # Megatron keeps an `_extra_state` for every module that has one
NO_STATE = ("mapping_proj.weight", "router.weight")
UNQUANTISED = ("router", "weights")  # last words, beside the pools
KEPT = ("sink", "router_bias", "bias", "fn", "base", "scale", "pre", "post", "res")  # last words; high precision


def lines_block(lines: tuple[Line, ...], sizes: Mapping[str, int], *more: Row, **others: tuple[Row, ...]) -> Block:
    """A block of one-param tensors, with `more` rows of Megatron and `others` of the other layouts."""
    kept = [ln.param for ln in lines if ln.param.rpartition(".")[2] in KEPT]
    pools = [ln.param for ln in lines if ln.param.endswith(("pool.kv", "pool.gate"))]
    wide = [*kept, *pools]  # AutoModel computes attention's pooling in float32, and keeps its weights so
    unquantised = [*pools, *(ln.param for ln in lines if ln.param.rpartition(".")[2] in UNQUANTISED)]
    modules = [ln.names["megatron"] for ln in lines if ln.names["megatron"].endswith(MATRIX)]
    rows: dict[str, tuple[Row, ...]] = {
        "hf": tuple(rows_of(lines, "hf")),
        "native": (
            *only(*rows_of(lines, "native"), form="tree"),
            *only(*rows_of(lines, "automodel", float32=wide), form="automodel"),
        ),
        "megatron": (
            *rows_of(lines, "megatron"),
            *b.te(*(m.removesuffix(MATRIX) for m in modules if not m.endswith(NO_STATE))),
        ),
    }
    extra = {"megatron": more, **others}
    merged = {layout: found + extra.get(layout, ()) for layout, found in rows.items()}
    return Block(tuple(params_of(lines, sizes, high_precision=kept, unquantised=unquantised)), merged)


def hyper_connection(hf: str, tree: str, megatron: str, sizes: Mapping[str, int]) -> Block:
    """How one sub-layer reads and writes the streams; AutoModel keeps all of it in float32."""
    block = b.hyper_connection(sizes["H"], sizes["s"], hf=hf, tree=tree, megatron=megatron)
    wide = tuple(replace(r, dtype="F32") for r in block.rows["native"] if isinstance(r, Rule))
    native = (*only(*block.rows["native"], form="tree"), *only(*wide, form="automodel"))
    return replace(block, rows={**block.rows, "native": native})


def attention(n: Mapping[str, int], ratio: int) -> Block:
    """Attention over a window, and over pooled keys where the layer compresses."""
    norm = table(COLUMNS, "norm H attn_norm.weight input_layernorm.weight = input_layernorm.weight")
    lines = [*norm, *ATTENTION]
    sparse = ratio == SPARSE_RATIO
    if ratio:
        lines += [line.under("pool.", **COMPRESSOR_AT) for line in COMPRESSOR]
    if sparse:
        lines += [line.under("indexer.", **INDEXER_AT) for line in INDEXER]
        pooled = (replace(line, shape=line.shape.replace("D", "Y")) for line in COMPRESSOR)
        lines += [line.under("indexer.pool.", **INDEXER_KEYS_AT) for line in pooled]
    return lines_block(tuple(lines), {**n, "r": ratio, "c": 2 if sparse else 1})


def moe(n: Mapping[str, int], hashed: bool) -> Block:
    """Experts and a shared one; the first layers choose experts by token id, without a bias."""
    without = "router_bias" if hashed else "token_table"
    norm = table(COLUMNS, "norm H ffn_norm.weight post_attention_layernorm.weight = pre_mlp_layernorm.weight")
    lines = (*norm, *(line for line in ROUTER if line.param != without))
    own = lines_block(lines, n)
    experts = b.moe(b.Moe(n["H"], n["E"], n["I"], n["S"], gated=True, router_bias=False))
    parts = {"w1": "gate", "w3": "up", "w2": "down"}
    first = ("experts.{e}.gate", "experts.{e}.up")
    hf = [rule(f"ffn.experts.{{e}}.{w}.weight", f"experts.{{e}}.{p}") for w, p in parts.items()]
    tree = [
        rule("mlp.experts.gate_up_proj", *first, op=Concat(0), over=("e",)),
        rule("mlp.experts.down_proj", "experts.{e}.down", over=("e",)),
    ]
    automodel = [
        rule("mlp.experts.gate_and_up_projs", *first, op=Permute((1, 0), Concat(0)), over=("e",)),
        rule("mlp.experts.down_projs", "experts.{e}.down", op=Permute((1, 0)), over=("e",)),
    ]
    shared = [(w, p) for w, p in parts.items() if n["S"]]
    rows = {
        "hf": (*own.rows["hf"], *hf, *(rule(f"ffn.shared_experts.{w}.weight", f"shared.{p}") for w, p in shared)),
        "native": (
            *own.rows["native"],
            *only(*tree, form="tree"),
            *only(*automodel, form="automodel"),
            *(rule(f"mlp.shared_experts.{p}_proj.weight", f"shared.{p}") for _, p in shared),
        ),
        "megatron": (*own.rows["megatron"], *(r for r in experts.rows["megatron"] if not _named(r, own))),
    }
    params = {p.name: p for p in (*own.params, *experts.params)}
    return Block(tuple(params.values()), rows, experts.domains)


def _named(row: Row, block: Block) -> bool:
    """Whether a block has a row for the same tensor or object already."""
    return any(_name(row) == _name(other) for other in block.rows["megatron"])


def _name(row: Row) -> str:
    named = row.tensor if isinstance(row, Rule | Copy) else row.key if isinstance(row, Extra) else row.param
    return named.replace("{moe_norm}", b.MEGATRON_WORDS["moe_norm"][0])


def ends(d: Dims) -> Block:
    """Embedding, the mix of the streams, final norm and output head."""
    n = d.sizes
    prefixes = {"native": "model.", "automodel": "model.", "megatron": "decoder."}
    head = (line.under("", **prefixes) for line in HEAD)
    lines = tuple(replace(ln, names={**ln.names, "hf": "{hc_head}" + ln.param.rpartition(".")[2]}) for ln in head)
    main = b.ends(
        n["H"], n["V"], tied=d.tied, embedding="{embeddings}.weight", norm="{trunk}norm.weight", head="head.weight"
    )
    streams = lines_block(lines, n)
    wide = tuple(
        replace(r, dtype="F32") if isinstance(r, Rule) and r.params == ("head",) else r for r in main.rows["native"]
    )
    native = (*only(*main.rows["native"], form="tree"), *only(*wide, form="automodel"))
    rows = {layout: (*found, *streams.rows[layout]) for layout, found in {**main.rows, "native": native}.items()}
    return Block((*main.params, *streams.params), rows)


def places(d: Dims) -> Iterator[Placed]:
    """Every block of the model with its prefix in each layout."""
    n = d.sizes
    yield Placed(ends(d), "", {"hf": "", "native": "", "megatron": "{wrapper}"})
    streams = {
        "attention_streams": hyper_connection("hc_attn", "attn_hc", "self_attention_hyper_connection", n),
        "mlp_streams": hyper_connection("hc_ffn", "ffn_hc", "mlp_hyper_connection", n),
    }
    layer = {"hf": "{trunk}layers.{i}.", "native": b.NATIVE.layer, "megatron": b.MEGATRON.layer}
    for i, (ratio, hashed) in enumerate(zip(d.ratios, d.hashed, strict=True)):
        for role, block in {"attention": attention(n, ratio), "mlp": moe(n, hashed), **streams}.items():
            yield Placed(block, f"layers.{{i}}.{role}.", layer, {"i": i})
    depth = {"hf": "mtp.{k}.", "native": b.NATIVE.fusion, "megatron": b.MEGATRON.fusion}
    inner = {**depth, "megatron": b.MEGATRON.inner}
    norm = table(COLUMNS, "final_layernorm H norm.weight = = final_layernorm.weight")
    copies = (Copy("emb.tok_emb.weight", "embedding"), Copy("head.weight", "embedding" if d.tied else "head"))
    outside = lines_block((*FUSION, *HEAD, *norm), n, hf=copies)
    for k in range(d.depths):
        ratio = d.mtp_ratios[k] if k < len(d.mtp_ratios) else 0
        yield Placed(outside, "mtp.{k}.", depth, {"k": k})
        for role, block in {"attention": attention(n, ratio), "mlp": moe(n, False), **streams}.items():
            yield Placed(block, f"mtp.{{k}}.{role}.", inner, {"k": k})


def megatron_args(config: Config, steps: int, repeated: bool) -> dict[str, Any]:
    """Argument names of the development branch; `steps` MTP depths run."""
    d = dims(config, 0)
    n = d.sizes
    experts = b.Moe(n["H"], n["E"], n["I"], n["S"], gated=True)
    ratios = [*d.ratios, *d.mtp_ratios[:steps], *[0] * (steps - len(d.mtp_ratios))]
    return {
        **args.model_args(config, layers=len(d.ratios), H=n["H"], V=n["V"], tied=d.tied),
        **args.gpt_args(config),
        **args.attention_args(b.Attention(n["H"], n["Q"], n["Q"], n["D"])),
        **args.moe_args(config, experts, score="sqrtsoftplus"),
        **args.gpt_mtp_args(steps, repeated=repeated),
        "multi_latent_attention": True,
        "experimental_attention_variant": "dsv4_hybrid",
        "qk_layernorm": True,
        "q_lora_rank": n["A"],
        "v_head_dim": n["D"],
        **_rope_args(config, n["D"]),
        "o_groups": n["G"],
        "o_lora_rank": n["O"],
        "csa_compress_ratios": ratios,
        "csa_window_size": config.get("sliding_window", 128),
        "dsa_indexer_n_heads": n["X"],
        "dsa_indexer_head_dim": n["Y"],
        "dsa_indexer_topk": config.get("index_topk", 512),
        "activation_func_clamp_value": config.get("swiglu_limit", 10.0) or None,
        "moe_layer_freq": [1] * len(d.ratios),
        "moe_n_hash_layers": sum(d.hashed),
        "actual_vocab_size": n["V"],
        "enable_hyper_connections": True,
        "num_residual_streams": n["s"],
        "mhc_sinkhorn_iterations": config.get("hc_sinkhorn_iters", 20),
        "mhc_epsilon": config.get("hc_eps", 1e-6),
    }


def _rope_args(config: Config, head: int) -> dict[str, Any]:
    """Rotary positions: plain ones where there is but a window, another base and YaRN in layers that compress.

    `head` is a head's size. The config has one section of settings for each, or both flat.
    """
    sections = config.get("rope_parameters")
    plain, compressed = (sections.get(n) if isinstance(sections, dict) else None for n in ("main", "compress"))
    scaling = rope_scaling({"rope_parameters": compressed} if compressed else config)
    turned = config.get("qk_rope_head_dim") or int(head * (config.get("partial_rotary_factor") or 0.125))
    return {
        "qk_pos_emb_head_dim": turned,
        "qk_head_dim": head - turned,
        "rotary_percent": 1.0,  # the turned dimensions are a head of their own, whatever partial_rotary_factor says
        "rotary_base": float((plain or config).get("rope_theta", 10000.0)),
        "csa_compress_rotary_base": float(
            (compressed or {}).get("rope_theta") or config.get("compress_rope_theta", 160000.0)
        ),
        "rope_type": "yarn" if scaling else "rope",
        "rotary_scaling_factor": float(scaling.get("factor", 1.0)),
        **{f: scaling[f] for f in ("original_max_position_embeddings", "beta_fast", "beta_slow") if f in scaling},
        "mscale": 1.0,  # both alike: YaRN's correction of attention is not used
        "mscale_all_dim": 1.0,
    }


FAMILY = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    title="DeepSeek-V4 (hyper-connections, compressed sparse attention, MoE)",
    dims=dims,
    places=places,
    choices={
        "hf": {
            "trunk": ("", "model."),
            "embeddings": ("embed", "model.embed_tokens"),
            "hc_head": ("hc_head_", "model.hc_head.hc_"),
            "kv_norm": ("kv_norm", "norm"),
        },
        "megatron": b.megatron_words("wrapper", "moe_norm", "final_norm", inner="transformer_layer"),
        "native": {"form": ("tree", "automodel")},
    },
    variants={
        "hf": {
            "transformers": {
                "trunk": "model.",
                "embeddings": "model.embed_tokens",
                "hc_head": "model.hc_head.hc_",
                "kv_norm": "norm",
            }
        },
        "native": {"automodel": {"form": "automodel"}},
    },
    depths=DEPTHS,
    forms=b.MEGATRON_FORMS,
    megatron_args=megatron_args,
    megatron_since=(0, 19),
    released=Released((1,), ("fp8", "mxfp4")),
    scales="scale",
    foreign={
        "dspark_block_size": "a DSpark drafter below `mtp.`, no MTP depth",
        "mtp.0.main_norm.weight": "a DSpark drafter below `mtp.`, no MTP depth",
    },
    notes=(
        "There is no eh_proj: e_proj(enorm(embedding)) and h_proj(hnorm(stream)) are added, for every stream.",
        "An MTP depth gets the streams before they are mixed, and has a mix (hc_head) and a final norm of its own.",
        "Megatron names are those of its development branch (2026); no release loads them.",
        "Flash-Base stores copies of embedding and head in its MTP depth; they are compared, and written back.",
    ),
)
