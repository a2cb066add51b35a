"""MiMo, MiMo-V2, Step, ERNIE and Inkling: configs of released sizes, both spellings of fields, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from _kit import Config
from _mimo_tiny import Shapes, family_of, layout, shapes, tiny

from mtp_convert.adapters import find
from mtp_convert.mapping.family import ConfigError

FEW = 8  # experts in the large configs, which have 64 to 288: every one of them is listed, and that takes seconds


def flash() -> Config:
    """The language model of MiMo-V2.6-Flash; Flash itself has the same sizes, stores q, k and v apart, and counts no
    depths."""
    return tiny(
        "mimo_v2_flash",
        model_type="mimo_v2",
        attention_projection_layout="fused_qkv",
        vocab_size=152576,
        hidden_size=4096,
        num_hidden_layers=48,
        hybrid_layer_pattern=[int(i != 0 and (i + 1) % 6 != 0) for i in range(48)],
        moe_layer_freq=[0] + [1] * 47,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=192,
        v_head_dim=128,
        swa_num_attention_heads=64,
        swa_num_key_value_heads=8,
        swa_head_dim=192,
        swa_v_head_dim=128,
        intermediate_size=16384,
        moe_intermediate_size=2048,
        n_routed_experts=FEW,
        num_nextn_predict_layers=3,
    )


def step() -> Config:
    """Step-3.5-Flash."""
    return tiny(
        "step3p5",
        vocab_size=128896,
        hidden_size=4096,
        num_hidden_layers=45,
        num_nextn_predict_layers=3,
        layer_types=["full_attention" if i < 45 and i % 4 == 0 else "sliding_attention" for i in range(48)],
        moe_layers_enum=",".join(map(str, range(3, 45))),
        num_attention_heads=64,
        num_attention_groups=8,
        head_dim=128,
        attention_other_setting={"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        intermediate_size=11264,
        moe_intermediate_size=1280,
        moe_num_experts=FEW,
        share_expert_dim=1280,
    )


def inkling() -> Config:
    text = {
        "vocab_size": 201024,
        "hidden_size": 6144,
        "num_hidden_layers": 66,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "swa_num_attention_heads": 64,
        "swa_num_key_value_heads": 16,
        "swa_head_dim": 128,
        "d_rel": 16,
        "rel_extent": 1024,
        "sliding_window_size": 512,
        "local_layer_ids": [i for i in range(66) if (i + 1) % 6],
        "dense_mlp_idx": 2,
        "dense_intermediate_size": 24576,
        "intermediate_size": 3072,
        "n_routed_experts": FEW,
        "n_shared_experts": 2,
    }
    mtp = {"chain_hidden_post_norm": True, "local_layer_ids": [], "num_nextn_predict_layers": 8}
    return tiny("inkling", text_config=text, mtp_config=mtp)


RELEASED: dict[str, tuple[Config, int, int, Shapes]] = {  # config, tensors, those of MTP, some shapes
    "MiMo-7B": (
        tiny(
            "mimo",
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=None,
            num_hidden_layers=36,
            num_nextn_predict_layers=1,
            vocab_size=151680,
        ),
        36 * 12 + 3 + 16,
        16,
        {
            "model.mtp_layers.0.input_proj.weight": (4096, 8192),
            "model.mtp_layers.0.self_attn.k_proj.bias": (1024,),
        },
    ),
    "MiMo-V2.6-Flash": (
        flash(),
        3 + 9 * 3 + 39 * 4 + 4 + 47 * (3 + FEW * 3) + 3 * 12,
        3 * 12,
        {
            "model.layers.0.self_attn.qkv_proj.weight": (13568, 4096),
            "model.layers.1.self_attn.qkv_proj.weight": (14848, 4096),
            "model.mtp.layers.2.self_attn.o_proj.weight": (4096, 8192),
        },
    ),
    "Step-3.5-Flash": (
        step(),
        3 + 3 * 12 + 42 * 17 + 3 * 17,
        3 * 17,
        {
            "model.layers.3.moe.gate_proj.weight": (FEW, 1280, 4096),
            "model.layers.47.self_attn.g_proj.weight": (96, 4096),
            "model.layers.47.transformer.shared_head.output.weight": (128896, 4096),
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        tiny(
            "ernie4_5_moe",
            hidden_size=2560,
            intermediate_size=12288,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=None,
            num_hidden_layers=28,
            moe_num_experts=FEW,
            moe_intermediate_size=1536,
            vocab_size=103424,
        ),
        2 + 9 + 27 * (6 + 2 + FEW * 3 + 3) + 12,
        12,
        {
            "model.layers.27.mlp.shared_experts.up_proj.weight": (3072, 2560),
            "model.mtp_linear_proj.0.weight": (2560, 5120),
        },
    ),
    "Inkling": (
        inkling(),
        4 + 2 * 17 + 64 * 21 + 8 * 20 + 1,
        8 * 20 + 1,
        {
            "model.llm.layers.2.mlp.experts.w13_weight": (FEW, 6144, 6144),
            "model.llm.layers.2.mlp.gate.weight": (FEW + 2, 6144),
            "model.mtp.layers.7.input_proj.weight": (6144, 12288),
            "model.mtp.layers.7.transformer_block.attn.wk_dv.weight": (1024, 6144),
        },
    ),
}


@pytest.mark.parametrize("release", RELEASED)
def test_released_sizes(release: str) -> None:
    config, tensors, mtp, some = RELEASED[release]
    found = layout(config)
    assert len(found.bindings) == tensors
    assert sum(b.parts[0].param.startswith("mtp.") for b in found.bindings.values()) == mtp
    assert shapes(found).items() >= some.items()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mimo", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("mimo", {"attention_bias": False}, "attention_bias"),
        ("mimo", {"intermediate_size": "24"}, "intermediate_size"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 2, 1, 0]}, "hybrid_layer_pattern must say 1 or 0 or"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1]}, "for each of 4 layers"),
        ("mimo_v2_flash", {"moe_layer_freq": [[0], 1, 1, 1]}, "moe_layer_freq"),
        ("mimo_v2_flash", {"moe_layer_freq": None, "mlp_layer_types": None}, "neither moe_layer_freq nor mlp_layer"),
        ("mimo_v2_flash", {"attention_projection_layout": "rows"}, "attention_projection_layout must be 'fused_qkv'"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ("mimo_v2_flash", {"v_head_dim": None}, "v_head_dim"),
        ("step3p5", {"moe_layers_enum": "1,x"}, "moe_layers_enum must list layers, got '1,x'"),
        ("step3p5", {"moe_layers_enum": 3}, "moe_layers_enum must list layers, got 3"),
        ("step3p5", {"layer_types": ["full_attention", "conv"] * 2}, "layer_types must say 'sliding_attention' or"),
        ("step3p5", {"layer_types": ["full_attention"] * 4 + ["conv"]}, "layer_types must say"),
        ("step3p5", {"attention_other_setting": 6}, "attention_other_setting must be an object"),
        ("step3p5", {"mlp_bias": True}, "mlp_bias: no model of this class has biases"),
        ("step3p5", {"num_attention_groups": 5}, "num_attention_heads 4 is no multiple of the 5"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("ernie4_5_moe", {"moe_num_experts": None}, "moe_num_experts"),
        ("ernie4_5_moe", {"moe_layer_end_index": -2}, "moe_layer_end_index"),
        ("inkling", {"text_config": {}}, "hidden_size"),
        ("inkling", {"mtp_config": {"num_nextn_predict_layers": 1, "local_layer_ids": 3}}, "local_layer_ids must be a"),
    ],
)
def test_configs_that_cannot_be_are_named(name: str, change: Config, message: str) -> None:
    config = tiny(name, **change)
    with pytest.raises(ConfigError) as caught:
        family_of(config)
    assert message in str(caught.value)


def test_what_transformers_calls_the_fields_means_the_same() -> None:
    """It has other names for the lists, and for MiMo-V2 one kind of heads; windows have twice the key/value heads."""
    released = tiny("mimo_v2_flash")
    gone = [f for f in released if f.startswith(("swa_", "hybrid_", "moe_layer_"))]
    saved = tiny("mimo_v2_flash", **dict.fromkeys(gone))
    assert shapes(layout(saved)) == shapes(layout(released))
    released = tiny("step3p5")
    saved = tiny(
        "step3p5",
        layer_types=released["layer_types"][:4],
        mtp_layer_types=released["layer_types"][4:],
        moe_layers_enum=None,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        attention_other_setting=None,
        num_sliding_attention_heads=6,
        num_attention_groups=None,
        num_key_value_heads=2,
        moe_num_experts=None,
        n_routed_experts=4,
    )
    assert shapes(layout(saved)) == shapes(layout(released))
    released = tiny("inkling")
    own = {"num_mtp_layers": 2, "mtp_local_layer_ids": [1], "chain_hidden_post_norm": True}
    text = {**released["text_config"], **own}
    assert shapes(layout(tiny("inkling", mtp_config=None, text_config=text))) == shapes(layout(released))
    assert shapes(layout(text)) == shapes(layout(released))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"mtp_config": {"num_nextn_predict_layers": 8}}, ("mtp_config", "num_nextn_predict_layers")),
        ({"text_config": {"num_mtp_layers": 8}}, ("text_config", "num_mtp_layers")),
        ({"num_mtp_layers": 8}, ("num_mtp_layers",)),
    ],
)
def test_inkling_counts_depths_where_its_config_does(config: dict[str, Any], where: tuple[str, ...]) -> None:
    depths = family_of(tiny("inkling"))[0].depths
    assert depths.declared(config) == 8
    found: Any = depths.corrected(config, 2)
    for field in where:
        found = found[field]
    assert found == 2


def test_the_language_model_of_step_3_7_is_found() -> None:
    assert find({"model_type": "step3p7", "text_config": tiny("step3p5")}) == (
        family_of(tiny("step3p5"))[0],
        ("text_config",),
    )


@pytest.mark.parametrize("name", ["mimo", "mimo_v2_flash", "step3p5", "ernie4_5_moe", "inkling"])
def test_training_arguments_agree_with_the_sizes(name: str) -> None:
    config = tiny(name)
    family, dims = family_of(config)
    args = family.megatron_args(config, 2, False)
    assert (args["mtp_num_layers"], args["vocab_size"], args["hidden_size"]) == (2, 64, 16)
    assert args["num_layers"] == (2 if name == "mimo" else 4)
    assert args["untie_embeddings_and_output_weights"] is not dims.tied
    expected = {
        "mimo_v2_flash": [0, 1, 1, 1],
        "step3p5": [0, 1, 1, 1],
        "ernie4_5_moe": [0, 1, 1, 1],
        "inkling": [0, 1, 1, 1],
    }
    assert args.get("moe_layer_freq") == expected.get(name)
