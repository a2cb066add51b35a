"""DeepSeek-V4's params: shape, and name in the release, in the module tree, in AutoModel, and in Megatron-Core.

Letters of the shapes:
    H hidden   V vocab   Q heads   D head dim   A query rank   G output groups   O output rank   J = Q*D/G
    E experts   I expert mlp   S shared-expert mlp   K experts per token   s hyper-connection streams   M = (2+s)*s
    X indexer heads   Y indexer head dim   r tokens per compressed key   c 2 where compressed windows overlap, else 1
A slash marks the axis that tensor parallelism cuts (heads and output groups).
"""

from __future__ import annotations

from mtp_convert.adapters.blocks.table import table

COLUMNS = "hf native automodel megatron"

ATTENTION = table(
    COLUMNS,
    """
    q_a       A,H     wq_a.weight        q_a_proj.weight  wq_a.weight         linear_q_down_proj.weight
    q_a_norm  A       q_norm.weight      q_a_norm.weight  q_norm.weight       q_layernorm.weight
    q_b       Q*D/,A  wq_b.weight        q_b_proj.weight  wq_b.weight         linear_q_up_proj.weight
    kv        D,H     wkv.weight         kv_proj.weight   wkv.weight          linear_kv_proj.weight
    kv_norm   D       {kv_norm}.weight   kv_norm.weight   =                   kv_layernorm.weight
    o_a       G*O/,J  wo_a.weight        o_a_proj.weight  wo_a.weight         linear_o_group_proj
    o_b       H,G*O/  wo_b.weight        o_b_proj.weight  wo_b.weight         linear_proj.weight
    sink      Q/      attn_sink          sinks            sinks_param.weight  core_attention.attn_sink
    """,
    hf="attn.",
    native="self_attn.",
    automodel="self_attn.",
    megatron="self_attention.",
)
COMPRESSOR = table(
    COLUMNS,
    """
    kv    c*D,H  wkv.weight    kv_proj.weight    wkv.weight        linear_wkv.weight
    gate  c*D,H  wgate.weight  gate_proj.weight  wgate.weight      linear_wgate.weight
    bias  r,c*D  ape           position_bias     ape_param.weight  ape
    norm  D      norm.weight   kv_norm.weight    =                 norm.weight
    """,
)
INDEXER = table(
    COLUMNS,
    """
    q_b      X*Y,A  wq_b.weight          q_b_proj.weight             wq_b.weight          linear_wq_b.weight
    weights  X,H    weights_proj.weight  scorer.weights_proj.weight  weights_proj.weight  linear_weights_proj.weight
    """,
)
COMPRESSOR_AT = {
    "hf": "attn.compressor.",
    "native": "self_attn.compressor.",
    "automodel": "self_attn.compressor.",
    "megatron": "self_attention.core_attention.compressor.",
}
INDEXER_AT = {
    "hf": "attn.indexer.",
    "native": "self_attn.compressor.indexer.",
    "automodel": "self_attn.compressor.indexer.",
    "megatron": "self_attention.core_attention.indexer.",
}
# The indexer pools keys of its own; only the trees do not call that a compressor.
INDEXER_KEYS_AT = {**INDEXER_AT, "hf": "attn.indexer.compressor.", "megatron": INDEXER_AT["megatron"] + "compressor."}
ROUTER = table(
    COLUMNS,
    """
    router       E,H  gate.weight  gate.weight                    =  router.weight
    router_bias  E    gate.bias    gate.e_score_correction_bias   =  router.expert_bias
    token_table  V,K  gate.tid2eid  gate.tid2eid                  =  router.tid2eid
    """,
    hf="ffn.",
    native="mlp.",
    automodel="mlp.",
    megatron="mlp.",
)
FUSION = table(
    COLUMNS,
    """
    enorm   H    enorm.weight   =  =  enorm.weight
    hnorm   H    hnorm.weight   =  =  hnorm.weight
    e_proj  H,H  e_proj.weight  =  =  e_proj.weight
    h_proj  H,H  h_proj.weight  =  =  h_proj.weight
    """,
)
HEAD = table(
    COLUMNS,
    """
    hc_head.fn     s,s*H  hc_head_fn     hc_head.hc_fn     =  hc_head_fn
    hc_head.base   s      hc_head_base   hc_head.hc_base   =  hc_head_base
    hc_head.scale  1      hc_head_scale  hc_head.hc_scale  =  hc_head_scale
    """,
)
