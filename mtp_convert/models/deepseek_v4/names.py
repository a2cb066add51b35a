"""How files spell the tensors of the tree: as released, as transformers writes them, and as the tree itself.

Symbols: E experts, I expert size, H hidden size; N backbone layers, i a layer, k an MTP depth, e an expert.

One tensor of the tree may be several in a file: each of these is a view of the tree's tensor, so that reading
copies into the view and writing copies from it.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

_ATTENTION = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
}
_COMPRESSOR = {
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
}
_MOE = {
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
_STREAMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"attn_hc.{part}": f"hc_attn_{part}" for part in ("fn", "base", "scale")},
    **{f"ffn_hc.{part}": f"hc_ffn_{part}" for part in ("fn", "base", "scale")},
}
_MTP = {
    **{name: name for name in ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight")},
    **{f"hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}
_LAYER = _ATTENTION | _COMPRESSOR | _MOE | _STREAMS | _MTP
_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    **{f"model.hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}
# What transformers writes instead of the released name: its rule for the compressor's norm, reversed, hits this one.
_ALSO_WRITTEN = {"attn.kv_norm.weight": "attn.norm.weight"}

# Tensors that a file may hold twice, for each MTP depth: the copy's name and the tree's tensor.
MTP_COPIES = {"emb.tok_emb.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


def released_views(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the tree as the released tensors that it consists of, by released name."""
    if name in _TOP:
        return {_TOP[name]: tensor}
    root, _, index, leaf = name.split(".", 3)
    prefix = f"layers.{index}." if root == "model" else f"mtp.{index}."
    return {prefix + suffix: view for suffix, view in _parts(leaf, tensor).items()}


def spellings(name: str, tensor: Tensor, *, layers: int) -> Iterator[dict[str, Tensor]]:
    """Every set of file tensors that can stand for a tensor of the tree, the released one first.

    `layers` is N: MTP depth k may also be named like layer N + k.
    """
    if name in _TOP:
        yield {_TOP[name]: tensor}
    else:
        root, _, index, leaf = name.split(".", 3)
        backbone = (f"layers.{index}.", f"model.layers.{index}.")
        for prefix in backbone if root == "model" else mtp_prefixes(int(index), layers=layers):
            yield from _layer_spellings(prefix, leaf, tensor)
    yield {name: tensor}


def mtp_prefixes(depth: int, *, layers: int) -> tuple[str, ...]:
    """What the names of one MTP depth may begin with."""
    number = layers + depth
    return f"mtp.{depth}.", f"layers.{number}.", f"model.layers.{number}."


def _layer_spellings(prefix: str, leaf: str, tensor: Tensor) -> Iterator[dict[str, Tensor]]:
    parts = _parts(leaf, tensor)
    yield {prefix + suffix: view for suffix, view in parts.items()}
    for suffix in _ALSO_WRITTEN.keys() & parts.keys():
        yield {prefix + _ALSO_WRITTEN[suffix]: tensor}
    yield {prefix + leaf: tensor}


def _parts(leaf: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """A tensor of one layer by released names within the layer."""
    if leaf == "mlp.experts.gate_up_proj":  # [E, 2I, H], rows w1 then w3
        size = tensor.shape[1] // 2
        halves = {"w1": tensor[:, :size], "w3": tensor[:, size:]}
        return {f"ffn.experts.{e}.{w}.weight": half[e] for e in range(len(tensor)) for w, half in halves.items()}
    if leaf == "mlp.experts.down_proj":  # [E, H, I]
        return {f"ffn.experts.{e}.w2.weight": tensor[e] for e in range(len(tensor))}
    return {_LAYER[leaf]: tensor}
