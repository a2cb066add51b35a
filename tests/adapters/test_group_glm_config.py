"""GLM, LongCat, Ling, HY and MiniMax-M3: released sizes, both spellings of fields, training arguments, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from _glm_tiny import Shapes, family_of, folder, layout, shapes, text, tiny
from _kit import Config

from mtp_convert.adapters import find
from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.mapping.family import ConfigError

FEW = 8  # experts in the large configs, which have 64 to 512: every one of them is listed, and that takes seconds
GLM_45: Config = {
    "vocab_size": 151552,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": FEW,
    "num_nextn_predict_layers": 1,
}
GLM_5: Config = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "first_k_dense_replace": 3,
    "n_routed_experts": FEW,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk_freq": None,
}
LONGCAT: Config = {
    "vocab_size": 131072,
    "hidden_size": 6144,
    "ffn_hidden_size": 12288,
    "expert_ffn_hidden_size": 2048,
    "num_layers": 28,
    "num_attention_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": FEW,
    "zero_expert_num": 256,
}
HY: Config = {
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": FEW,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
}
MOE = 3 * FEW + 2 + 3  # routed experts, router and its bias, the shared expert
RELEASED: dict[str, tuple[str, Config, int, int, Shapes]] = {  # family, sizes, tensors, those of MTP, some shapes
    "GLM-4.5": (
        "glm4_moe",
        GLM_45,
        3 + 3 * (2 + 9 + 3) + 89 * (2 + 9 + MOE) + (4 + 2 + 9 + MOE),
        4 + 2 + 9 + MOE,
        {
            "model.layers.92.eh_proj.weight": (5120, 10240),
            "model.layers.92.self_attn.k_proj.bias": (1024,),
            "model.layers.2.mlp.up_proj.weight": (12288, 5120),
        },
    ),
    "GLM-5": (
        "glm_moe_dsa",
        GLM_5,
        3 + 3 * (2 + 12 + 3) + 75 * (2 + 12 + MOE) + (4 + 2 + 12 + MOE),
        4 + 2 + 12 + MOE,
        {
            "model.layers.78.self_attn.indexer.wq_b.weight": (4096, 2048),
            "model.layers.78.self_attn.kv_b_proj.weight": (28672, 512),
        },
    ),
    "LongCat-Flash": (
        "longcat_flash",
        LONGCAT,
        3 + 28 * (2 * (2 + 7 + 3) + 3 * FEW + 2) + (4 + 2 + 7 + 3),
        4 + 2 + 7 + 3,
        {
            "model.layers.27.mlp.router.classifier.weight": (FEW + 256, 6144),
            "model.mtp.layers.0.transformer_layer.mlp.down_proj.weight": (6144, 12288),
        },
    ),
    "Hy3": (
        "hy_v3",
        HY,
        3 + (2 + 6 + 3) + 79 * (2 + 6 + MOE) + (4 + 2 + 6 + MOE),
        4 + 2 + 6 + MOE,
        {"model.layers.80.final_layernorm.weight": (4096,), "model.layers.1.mlp.router.gate.weight": (FEW, 4096)},
    ),
}


@pytest.mark.parametrize("release", RELEASED)
def test_sizes_of_releases(release: str) -> None:
    name, sizes, tensors, mtp, some = RELEASED[release]
    config = tiny(name, **sizes)
    found = shapes(layout(config))
    assert len(found) == tensors
    assert len(found) - len(layout(config, depths=0).bindings) == mtp
    assert found.items() >= some.items()


def test_glm_air_has_neither_norms_of_queries_and_keys_nor_their_names() -> None:
    air = layout(tiny("glm4_moe", use_qk_norm=None))
    assert not [n for n in air.bindings if "q_norm" in n or "k_norm" in n]
    assert "model.layers.4.self_attn.q_proj.bias" in air.bindings


def test_a_vision_language_glm_has_biases_where_its_config_says_nothing() -> None:
    plain = tiny("glm4_moe", attention_bias=None)
    wrapped = {"model_type": "glm4v_moe", "text_config": {**plain, "model_type": "glm4v_moe_text"}}
    assert not [n for n in layout(plain).bindings if n.endswith(".bias")]
    assert [n for n in layout(wrapped).bindings if n.endswith("q_proj.bias")]


SHARING: list[tuple[Config, list[int], dict[str, int]]] = [  # fields, layers without an indexer, Megatron's arguments
    ({"index_topk_freq": None}, [], {}),
    ({"index_topk_freq": 2, "index_skip_topk_offset": 2}, [2, 4], {"topk_freq": 2, "skip_topk_offset": 2}),
    ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, [1, 2, 4, 5], {"topk_freq": 3, "skip_topk_offset": 1}),
    ({"index_topk_freq": 4, "index_skip_topk_offset": None}, [2, 3, 4], {"topk_freq": 4, "skip_topk_offset": 2}),
    ({"index_topk_pattern": "FFSFSF"}, [2, 4], {"topk_freq": 2, "skip_topk_offset": 2}),
    ({"indexer_types": ["full"] * 5 + ["shared"]}, [5], {"topk_freq": 2, "skip_topk_offset": 5}),
]


@pytest.mark.parametrize(("fields", "shared", "arguments"), SHARING, ids=str)
def test_which_layers_of_glm_share_an_indexer(fields: Config, shared: list[int], arguments: dict[str, int]) -> None:
    config = tiny("glm_moe_dsa", num_hidden_layers=6, **fields)
    family, dims = family_of(config)
    own = {i for i in range(6) if f"model.layers.{i}.self_attn.indexer.wk.weight" in layout(config).bindings}
    assert sorted(set(range(6)) - own) == shared
    found = family.megatron_args(config, dims.depths, False)
    assert {n.removeprefix("dsa_indexer_"): found[n] for n in found if "topk_" in n and "dsa" in n} == arguments
    assert found["dsa_indexer_rotate_activation"] is False


def test_linear_layers_of_ling_end_with_the_last_group() -> None:
    """Layers behind the last whole group have latent attention."""
    config = tiny("bailing_hybrid", num_hidden_layers=5)
    linear = {i for i in range(5) if f"model.layers.{i}.attention.A_log" in layout(config).bindings}
    assert linear == {0, 2}
    words = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
    listed = layout(tiny("bailing_hybrid", num_hidden_layers=5, layer_types=words)).bindings
    assert {i for i in range(5) if f"model.layers.{i}.attention.A_log" in listed} == {0, 2, 4}


@pytest.mark.parametrize(("kind", "rows"), [("head_wise", 4), ("element_wise", 32), (None, 4)])
def test_gates_of_latent_attention(kind: str | None, rows: int) -> None:
    found = shapes(layout(tiny("bailing_hybrid", gated_attention_proj_granularity_type=kind)))
    assert found["model.layers.1.attention.g_proj.weight"] == (rows, 32)
    assert "model.layers.1.attention.g_proj.weight" not in layout(tiny("bailing_hybrid 2.5")).bindings


def test_sizes_that_transformers_renames_are_read() -> None:
    """It writes the size of a linear head apart, and the rotary one in its place."""
    found = layout(tiny("bailing_hybrid", head_dim=4, linear_head_dim=8))
    assert shapes(found) == shapes(layout(tiny("bailing_hybrid")))
    plain = tiny("minimax_m3", sparse_attention_config=None, moe_layer_freq=None, model_type="minimax_m3_vl_text")
    section = text(plain)
    section |= {"index_n_heads": 2, "index_head_dim": 8, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
    section["layer_types"] = ["full_attention"] + ["minimax_m3_sparse"] * 3
    assert shapes(layout(plain)) == shapes(layout(tiny("minimax_m3")))
    kimi = {"linear_num_heads": 4, "linear_head_dim": 8, "linear_conv_kernel_dim": 4}
    glm = tiny("glm5_next", linear_attn_config=None, **kimi)
    assert shapes(layout(glm)) == shapes(layout(tiny("glm5_next")))


def test_a_wrapper_is_known_whatever_its_section_calls_itself() -> None:
    for name in ("minimax_m3", "glm5_next"):
        assert find(tiny(name, model_type="some_text"))[0].name == name
        assert find(tiny(name, model_type=None))[0].name == name
    with pytest.raises(ConvertError, match="unknown family"):
        find({"model_type": "unknown", "text_config": {"model_type": "some_text"}})


ARGUMENTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"qk_layernorm": True, "add_qkv_bias": True, "rotary_percent": 0.5, "moe_layer_freq": [0, 1, 1, 1]},
    "glm4_moe_lite": {"multi_latent_attention": True, "moe_router_topk_scaling_factor": 1.8},
    "longcat_flash": {"num_layers": 4, "moe_router_score_function": "softmax", "moe_router_topk": 2},
    "bailing_moe": {"rotary_percent": 0.5, "moe_router_topk_scaling_factor": 2.5},
    "hy_v3": {"moe_router_topk_scaling_factor": 2.826, "moe_shared_expert_intermediate_size": 48},
    "minimax_m3": {"apply_layernorm_1p": True, "quick_geglu": True, "glu_linear_offset": 1.0, "rotary_percent": 0.5},
    "glm5_next": {"hybrid_layer_pattern": "K-DEKEDE/DE", "num_layers": 8, "num_residual_streams": 2},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_training_arguments(name: str) -> None:
    config = tiny(name)
    family, dims = family_of(config)
    found = family.megatron_args(text(config), dims.depths, False)
    assert found.items() >= ARGUMENTS[name].items()
    assert found["mtp_num_layers"] == dims.depths


REFUSED: list[tuple[str, Config, str]] = [
    ("glm4_moe", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ("glm4_moe", {"first_k_dense_replace": 4}, "no decoder layer is one"),
    ("glm4_moe", {"n_routed_experts": None}, "n_routed_experts"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must say 'sparse' or 'dense' for each of 4"),
    ("glm4_moe_lite", {"attention_bias": True}, "attention_bias"),
    ("glm_moe_dsa", {"index_n_heads": None}, "index_n_heads"),
    ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "full"]}, "at regular distances only"),
    ("glm_moe_dsa", {"indexer_types": ["shared", "full", "shared", "full"]}, "at regular distances only"),
    ("glm5_next", {"qk_rope_head_dim": 64}, "qk_rope_head_dim must be 0"),
    ("glm5_next", {"index_topk_freq": 2}, "shares indexers"),
    ("glm5_next", {"linear_attn_config": "x"}, "linear_attn_config must be an object"),
    ("longcat_flash", {"router_bias": True}, "router_bias"),
    ("longcat_flash", {"q_lora_rank": None}, "q_lora_rank"),
    ("longcat_flash", {"num_layers": 0}, "num_layers"),
    ("bailing_moe", {"use_bias": True}, "use_bias"),
    ("bailing_moe", {"num_experts": "4"}, "num_experts"),
    ("bailing_hybrid", {"full_attention_type": "gqa"}, "full_attention_type must be 'mla'"),
    ("bailing_hybrid", {"no_kda_lora": False}, "no_kda_lora must be true"),
    ("bailing_hybrid", {"gated_attention_proj_granularity_type": "block"}, "must be one of"),
    ("bailing_hybrid", {"layer_group_size": None}, "layer_group_size"),
    ("hy_v3", {"attention_bias": True, "mlp_bias": True}, "attention_bias and mlp_bias"),
    ("hy_v3", {"moe_intermediate_size": None, "expert_hidden_dim": None}, "moe_intermediate_size"),
    ("minimax_m3", {"attention_output_gate": True}, "attention_output_gate"),
    ("minimax_m3", {"dense_intermediate_size": None}, "dense_intermediate_size"),
    ("minimax_m3", {"sparse_attention_config": [1]}, "sparse_attention_config must be an object"),
    ("minimax_m3", {"sparse_disable_index_value": [0, 0, 1, 1]}, "indexer with values"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED, ids=str)
def test_configs_of_other_models_are_refused(name: str, fields: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(tiny(name, **fields))


@pytest.mark.parametrize("sign", ["ngram_vocab_size_ratio", "index_topk", "nextn_use_scmoe"])
def test_another_kind_of_longcat_is_refused(sign: str, tmp_path: Any) -> None:  # noqa: ANN401
    config = tiny("longcat_flash", **{sign: 2})
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(folder(tmp_path / "source", config))
    assert caught.value.code == "MTP021"
