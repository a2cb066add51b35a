"""What every block needs: the words of Megatron's names, and helpers that write rows.

Words of the Megatron layout: where a pre-norm lives (fused into the next linear by TransformerEngine, or separate),
what the block inside an MTP depth is called, whether equal decoder layers are stacked. A family lists those it uses.

`keys` says whose names they are: "dist" are the keys of a torch_dist checkpoint, "state_dict" those of the modules, as
legacy checkpoints (`mp_rank_XX`) store them. They differ where torch_dist takes a tensor apart or stacks several: rows
of such tensors are given twice, with `only(..., keys=...)`; all other rows serve both. For legacy checkpoints every
param also says with `Param.cut` how tensor parallelism cuts it.

`shards` says whether a tensor may have several shards of one rank. Where it may not ("single"), the gate and the up
half of a first matrix are two tensors, `_w` and `_v`, and every expert has its own: torch_dist under
`singleton_local_shards`, and what Megatron's FSDP stores.
"""

from __future__ import annotations

from dataclasses import replace

from mtp_convert.mapping.family import Form
from mtp_convert.mapping.ops import Concat
from mtp_convert.mapping.rules import Block, Copy, Extra, Row, Rule, only, rule

# The first spelling is what current Megatron-Core with TransformerEngine specs writes.
MEGATRON_WORDS: dict[str, tuple[str, ...]] = {
    "wrapper": ("", "model.", "module.", "language_model.", "model.module."),
    "keys": ("dist", "state_dict"),
    "experts": ("grouped", "sequential", "packed"),
    "shards": ("whole", "single"),
    "conv": ("conv1d_", "conv1d."),
    "inner": ("mtp_model_layer", "transformer_layer"),
    "decoder": ("per_layer", "stacked"),
    "attention_norm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "moe_norm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "delta_norm": ("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight"),
    "mamba_norm": ("mixer.in_proj.layer_norm_weight", "norm.weight"),
    "q_norm": ("linear_q_up_proj.layer_norm_weight", "q_layernorm.weight"),
    "kv_norm": ("linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight"),
    "final_norm": ("final_layernorm", "final_norm"),
}


ALWAYS = ("keys", "experts", "conv")
HALVES = ("_w", "_v")  # Megatron's names for the gate and for what it gates

# How the containers of Megatron checkpoints spell the layout.
MEGATRON_FORMS: dict[str, Form] = {
    "torch_dist": Form({"keys": "dist"}),
    "legacy": Form(
        {"keys": "state_dict", "decoder": "per_layer", "shards": "whole"},
        released=(
            ((0, 0), {"inner": "transformer_layer", "conv": "conv1d."}),
            ((0, 17), {"inner": "mtp_model_layer"}),
            ((0, 19), {"conv": "conv1d_"}),
        ),
    ),
}


def megatron_words(*names: str, **first: str) -> dict[str, tuple[str, ...]]:
    """The choices of a family: `names` of `MEGATRON_WORDS`, some with another released spelling."""
    chosen = {name: MEGATRON_WORDS[name] for name in (*ALWAYS, *names, "shards")}
    for name, spelling in first.items():
        chosen[name] = (spelling, *(s for s in MEGATRON_WORDS[name] if s != spelling))
    return chosen


def with_hf(block: Block, *rows: Row, native: tuple[Row, ...] | None = None) -> Block:
    """The block with its Hugging Face rows; those of the native tree where they differ."""
    return Block(block.params, {**block.rows, "hf": rows, "native": rows if native is None else native}, block.domains)


def with_copies(block: Block, *copies: Copy) -> Block:
    """The block with Hugging Face tensors that repeat params of other places."""
    return replace(block, rows={**block.rows, "hf": (*block.rows["hf"], *copies)})


def respelled(block: Block, layout: str, *changes: tuple[str, str]) -> Block:
    """The block with other names in one layout, of tensors and objects: every (old, new) is replaced, in order."""

    def changed(row: Row) -> Row:
        name = row.key if isinstance(row, Extra) else row.tensor if isinstance(row, Rule | Copy) else ""
        for old, new in changes:
            name = name.replace(old, new)
        if isinstance(row, Extra):
            return replace(row, key=name)
        return replace(row, tensor=name) if isinstance(row, Rule | Copy) else row

    return replace(block, rows={**block.rows, layout: tuple(map(changed, block.rows[layout]))})


def joined(first: Block, *others: Block) -> Block:
    """Blocks at one place as one; all of them have rows for the layouts of the first."""
    blocks = (first, *others)
    return Block(
        tuple(param for block in blocks for param in block.params),
        {layout: tuple(row for block in blocks for row in block.rows[layout]) for layout in first.rows},
        {index: values for block in blocks for index, values in block.domains.items()},
    )


def halves(tensor: str, *params: str) -> tuple[Row, ...]:
    """A first matrix (or bias) of one param, or of a gate above an up projection."""
    if len(params) == 1:
        return (rule(tensor, *params),)
    apart = (rule(tensor + half, param) for half, param in zip(HALVES, params, strict=True))
    return (*only(rule(tensor, *params, op=Concat(0)), shards="whole"), *only(*apart, shards="single"))


def te(*modules: str, over: tuple[str, ...] = ()) -> tuple[Extra, ...]:
    """The `_extra_state` objects of TransformerEngine modules."""
    return tuple(Extra(f"{m}._extra_state", over) for m in modules)


def norm_rows(before: str, last: str, *, behind: bool) -> tuple[Row, ...]:
    """The norm of a block, which is named `before` in front of it, and belongs to its `last` linear behind it."""
    if not behind:
        return (rule(before, "norm"),)
    return (rule(f"{last}.post_layernorm.weight", "norm"), *te(f"{last}.post_layernorm"))


def te_attention(*modules: str) -> tuple[Row, ...]:
    """The same of attention cores, which torch_dist leaves out."""
    return only(*te(*modules), keys="state_dict")


def renamed(*names: tuple[str, str], dtype: str = "") -> tuple[Row, ...]:
    """Rows for tensors that hold one param each, from (tensor, param)."""
    return tuple(rule(tensor, param, dtype=dtype) for tensor, param in names)
