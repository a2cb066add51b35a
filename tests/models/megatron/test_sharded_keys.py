"""Names and sharded entries against megatron-core's own, whole and on every rank, and loading by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _golden import (
    DATA,
    EXPERTS,
    FEATURES,
    LINEAR,
    MAMBA,
    build,
    differing,
    feature,
    lines,
    read_json,
    settings_of,
    settle,
    tiny,
)

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ParallelSizes
from mtp_convert.models.megatron.loading import load_rank, load_tensors, state_from_tensors, tensors_from_ranks

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 96,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
}
MOE: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
BIAS: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 24,
}
QWEN = BASE | {"qk_layernorm": True, "mtp_num_layers": 2}
DSV3 = {
    **BASE,
    **MOE,
    **BIAS,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
    "moe_layer_freq": (0, 1, 1, 1),
    "mtp_num_layers": 2,
}
HYBRID = {
    **BASE,
    **MOE,
    **BIAS,
    "num_layers": 5,
    "gated_linear_unit": False,
    "activation": "squared_relu",
    "position_embedding_type": "none",
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_state_dim": 8,
    "mamba_num_groups": 2,
    "hybrid_layer_pattern": "M*ME-/*E/*E",
    "mtp_num_layers": 2,
}
OLD = {"megatron_version": (0, 16)}
# file -> the model it is of
WHOLE: dict[str, dict[str, Any]] = {
    "0.19.2_dsv3_te": DSV3,
    "0.19.2_dsv3_te_single": DSV3 | {"mtp_num_layers": 1},
    "0.19.2_qwen2": QWEN | {"transformer_impl": "local"},
    "0.19.2_qwen2_te": QWEN,
    "0.19.2_qwen_tied_te": QWEN | {"mtp_num_layers": 1, "share_embeddings_and_output_weights": True},
    "0.19.2_qwenmoe_te": QWEN | MOE | {"mtp_num_layers": 1},
    "0.19.2_hyb_m": HYBRID,
    "0.19.2_hyb_rep": HYBRID
    | {"num_layers": 4, "hybrid_layer_pattern": "M*ME/M*E/M*E", "mtp_use_repeated_layer": True},
    "0.16.1_dsv3_te": DSV3 | OLD,
    "0.16.1_qwen2_te": QWEN | OLD,
}
PARALLEL = tuple(sorted(p.stem for p in (DATA / "parallel").glob("*.json")))


def test_every_file_has_its_model() -> None:
    assert {p.stem for p in (DATA / "keys").glob("*.txt")} == WHOLE.keys()


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model(name: str) -> None:
    version, *expected = (DATA / "keys" / f"{name}.txt").read_text().splitlines()
    assert version.split()[1] == name.split("_")[0]
    metadata = {"singleton_local_shards": True} if name.endswith("_single") else None
    assert sorted(lines(build(TransformerConfig(**WHOLE[name])), metadata)) == sorted(expected)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature(name: str) -> None:
    config, _, expected = feature(name)
    assert sorted(lines(build(config))) == sorted(expected)


@pytest.mark.parametrize("name", PARALLEL)
def test_every_rank(name: str) -> None:
    """Two processes cut by tensor, pipeline or expert; and the dtypes of a bfloat16 model."""
    stored = read_json(DATA / "parallel" / f"{name}.json")
    sizes = stored["parallel"]
    # Megatron runs experts without tensor cuts where data ranks hold them
    job = ParallelSizes(**sizes, dp=sizes.get("ep", 1), etp=1 if "ep" in sizes else None)
    config = settings_of(
        stored["model"],
        pipeline_model_parallel_size=sizes.get("pp", 1),
        params_dtype=getattr(torch, stored.get("dtype", "float32")),
    )
    assert job.world == len(stored["ranks"])
    for rank, expected in enumerate(stored["ranks"]):
        assert sorted(lines(build(config, job.at(rank)))) == sorted(expected), rank


# --- loading by the entries: any job's ranks together hold exactly the model -------------------------

LATENT = {n: DSV3[n] for n in ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim")}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 4, "qk_layernorm": True, "add_qkv_bias": True},
    "tied": {"num_layers": 4, "share_embeddings_and_output_weights": True},
    "experts": {"num_layers": 4, **EXPERTS},
    "latent": {"num_layers": 4, **EXPERTS, **LATENT, "qk_pos_emb_head_dim": 4, "moe_layer_freq": (0, 1, 1, 1)},
    "local": {"num_layers": 4, **EXPERTS, "transformer_impl": "local"},
    "hybrid": {"num_layers": 4, **EXPERTS, **MAMBA, "hybrid_layer_pattern": "M*E-/M*/M*"},
    "linear": {"num_layers": 4, **LINEAR, "linear_attention_freq": 2, "attention_output_gate": True},
}
JOBS = {
    "pp2 vp2": ParallelSizes(pp=2, vp=2),
    "ep2": ParallelSizes(dp=2, ep=2, etp=1),
    "tp2 pp2 ep2 etp2": ParallelSizes(tp=2, pp=2, dp=2, ep=2),
    "tp2 dp2": ParallelSizes(tp=2, dp=2),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("model", MODELS)
def test_ranks_hold_the_model_between_them(model: str, job: str) -> None:
    whole = settle(build(tiny(**MODELS[model])))
    tensors = tensors_from_ranks([whole.sharded_state_dict()])
    sizes = JOBS[job]
    pattern = MODELS[model].get("hybrid_layer_pattern")
    if sizes.vp and pattern:
        pattern = "M|*|E|-/M*/M*"
    config = tiny(
        **{
            **MODELS[model],
            "hybrid_layer_pattern": pattern,
            "pipeline_model_parallel_size": sizes.pp,
            "virtual_pipeline_model_parallel_size": sizes.vp,
        }
    )
    ranks = []
    for rank in range(sizes.world):
        for stage in range(sizes.vp or 1):
            part = build(config, sizes.at(rank), vp_stage=stage if sizes.vp else None)
            load_tensors(part, tensors)
            ranks.append(part.sharded_state_dict())
    back = tensors_from_ranks(ranks)
    assert back.keys() == tensors.keys()
    assert [n for n in back if not torch.equal(back[n], tensors[n])] == []


@pytest.mark.parametrize("metadata", [{"non_homogeneous_layers": True}, {"singleton_local_shards": True}], ids=str)
def test_other_layouts_of_a_checkpoint_load_too(metadata: dict[str, Any]) -> None:
    source, target = settle(build(tiny(**EXPERTS))), build(tiny(**EXPERTS))
    tensors = tensors_from_ranks([source.sharded_state_dict(metadata=metadata)])
    assert not any(n.startswith("decoder.layers.self_attention") for n in tensors)
    load_tensors(target, tensors, metadata)
    assert differing(source, target) == []


def test_everything_wrong_is_named_at_once() -> None:
    model = build(tiny())
    tensors = tensors_from_ranks([model.sharded_state_dict()])
    del tensors["mtp.layers.1.hnorm.weight"]
    tensors["mtp.layers.2.hnorm.weight"] = torch.zeros(16)
    tensors["mtp.layers.0.eh_proj.weight"] = torch.zeros(16, 31)
    with pytest.raises(ValueError) as caught:
        state_from_tensors(model, tensors)
    problems = str(caught.value).splitlines()[1:]
    assert [p.strip() for p in problems] == [
        "missing mtp.layers.1.hnorm.weight",
        "mtp.layers.0.eh_proj.weight: shape [16, 31], expected [16, 32]",
        "unexpected mtp.layers.2.hnorm.weight",
    ]


def test_states_of_other_transformer_engines_load_too() -> None:
    source, target = settle(build(tiny())), build(tiny())
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("norm._extra_state")}
    load_rank(target, {**state, "decoder.final_layernorm._extra_state": None})
    assert differing(source, target) == []
    del state["mtp.layers.1.hnorm.weight"]
    state["mtp.layers.2.hnorm.weight"] = torch.zeros(16)
    with pytest.raises(ValueError, match=r"missing mtp\.layers\.1\.hnorm\.weight\n  unexpected mtp\.layers\.2"):
        load_rank(target, state)


@pytest.mark.parametrize("rows", [24, 40])
def test_a_vocabulary_may_be_padded_differently(rows: int) -> None:
    source, target = settle(build(tiny(vocab_size=rows))), build(tiny())
    load_tensors(target, tensors_from_ranks([source.sharded_state_dict()]))
    got, stored = target.embedding.word_embeddings.weight, source.embedding.word_embeddings.weight
    kept = min(rows, 32)
    assert torch.equal(got[:kept], stored[:kept])
    assert not got[kept:].any()


def test_torn_tensors_are_named() -> None:
    sizes = ParallelSizes(tp=2)
    with pytest.raises(ValueError, match=r"ranks do not hold all of .*eh_proj\.weight"):
        tensors_from_ranks([build(tiny(), sizes.at(0)).sharded_state_dict()])


def test_sizes_must_divide_among_ranks() -> None:
    with pytest.raises(ValueError, match="query groups: 2 does not divide among 4 ranks"):
        build(tiny(), ParallelSizes(tp=4).at(0))
