"""GLM, LongCat, Ling, HY and MiniMax-M3: names against transformers and the releases, bytes there and back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _glm_tiny import NAMES, Shapes, family_of, folder, layout, random, shapes, text, tiny
from _kit import Config, Tensors, convert, differing, hf_folder
from safetensors.torch import load_file

from mtp_convert.checkpoint import open_checkpoint

BUILT: dict[str, Config] = {  # models that transformers has, with what differs from the fixture
    "glm4_moe": {},
    "glm4_moe without norms": {"use_qk_norm": False, "attention_bias": False},
    "glm4_moe with a tied head": {"tie_word_embeddings": True},
    "glm4_moe_lite": {},
    "glm4_moe_lite of words": {
        "first_k_dense_replace": None,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    },
    "glm_moe_dsa": {},
    "glm_moe_dsa without sharing": {"index_topk_freq": None},
    "bailing_hybrid": {},
    "hy_v3": {},
}


@cache
def model(name: str) -> Any:  # noqa: ANN401 - transformers' own class
    """transformers' model of a tiny config; where it is a part of a larger model, that one."""
    import transformers as t

    stem = name.partition(" ")[0]
    config = text(tiny(stem, **BUILT.get(name, {})))
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if stem == "minimax_m3":
        return t.AutoModelForCausalLM.from_config(
            t.AutoConfig.for_model(**{**config, "model_type": "minimax_m3_vl_text"})
        )
    if stem == "glm5_next":
        words = ["indexed_attention" if w == "deepseek_sparse_attention" else w for w in config["layer_types"]]
        vision |= {"out_hidden_size": 32, "projection_intermediate_size": 16}
        whole = t.Glm5NextConfig(text_config={**config, "layer_types": words}, vision_config=vision)
        return t.Glm5NextForConditionalGeneration(whole)
    return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(**config))


def language(tensors: Tensors, *, tied: bool = False) -> Shapes:
    left_out = {"lm_head.weight"} if tied else set()
    return {n: tuple(t.shape) for n, t in tensors.items() if n not in left_out and "visual." not in n}


def held(name: str) -> Tensors:
    return {n.replace("model.language_model.", "model."): t for n, t in model(name).state_dict().items()}


def saved(name: str, scratch: Path) -> Tensors:
    model(name).save_pretrained(scratch)
    return load_file(scratch / "model.safetensors")


@pytest.mark.parametrize("name", [*BUILT, "glm5_next"])
def test_the_backbone_is_what_transformers_saves_and_holds(name: str, tmp_path: Path) -> None:
    config = tiny(name.partition(" ")[0], **BUILT.get(name, {}))
    tied = bool(config.get("tie_word_embeddings"))
    # transformers writes the output projection of Kimi delta attention under another name than the release
    words = {"kda_out": "dense"} if name == "bailing_hybrid" else {}
    assert shapes(layout(config, depths=0, **words)) == language(saved(name, tmp_path), tied=tied)
    assert shapes(layout(config, "native", depths=0)) == language(held(name), tied=tied)


def test_minimax_is_what_transformers_saves_alone_and_holds(tmp_path: Path) -> None:
    config = tiny("minimax_m3")
    alone = layout(config, depths=0, wrapper="", names="transformers")
    assert shapes(alone) == language(saved("minimax_m3", tmp_path))
    assert shapes(layout(config, "native", depths=0)) == language(held("minimax_m3"))


def test_longcat_is_what_transformers_saves_and_holds_but_for_zero_experts(tmp_path: Path) -> None:
    """transformers makes matrices for experts that have none, and never uses them."""
    config = tiny("longcat_flash")
    found = language(saved("longcat_flash", tmp_path))
    zero = {n for n in found if ".experts.4." in n or ".experts.5." in n}
    assert len(zero) == 2 * 2 * 2
    assert shapes(layout(config, depths=0)) == {n: s for n, s in found.items() if n not in zero}
    native, there = shapes(layout(config, "native", depths=0)), language(held("longcat_flash"))
    assert native.keys() == there.keys()
    assert {n for n in native if native[n] != there[n]} == {
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
    }


def test_a_vision_language_glm_is_what_transformers_saves(tmp_path: Path) -> None:
    import transformers as t

    config = {**tiny("glm4_moe", use_qk_norm=None, num_nextn_predict_layers=None), "model_type": "glm4v_moe_text"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    whole = t.Glm4vMoeConfig(text_config=config, vision_config={**vision, "out_hidden_size": 32})
    t.Glm4vMoeForConditionalGeneration(whole).save_pretrained(tmp_path)
    wanted = layout({"model_type": "glm4v_moe", "text_config": config}, depths=0)
    assert shapes(wanted) == language(load_file(tmp_path / "model.safetensors"))


H, F, E, V = 32, 24, 4, 96  # hidden size, width and number of experts, vocabulary
GQA: Shapes = {"q_proj.weight": (32, H), "k_proj.weight": (16, H), "v_proj.weight": (16, H), "o_proj.weight": (H, 32)}
QK_NORM: Shapes = {"q_norm.weight": (8,), "k_norm.weight": (8,)}
BIASES: Shapes = {"q_proj.bias": (32,), "k_proj.bias": (16,), "v_proj.bias": (16,)}
LATENT_KV: Shapes = {
    "kv_a_proj_with_mqa.weight": (20, H),
    "kv_a_layernorm.weight": (16,),
    "kv_b_proj.weight": (64, 16),
}
LATENT_Q: Shapes = {"q_a_proj.weight": (16, H), "q_a_layernorm.weight": (16,), "q_b_proj.weight": (48, 16)}
LATENT: Shapes = {**LATENT_Q, **LATENT_KV, "o_proj.weight": (H, 32)}
INDEXER: Shapes = {
    "indexer.wq_b.weight": (16, 16),
    "indexer.wk.weight": (8, H),
    "indexer.k_norm.weight": (8,),
    "indexer.k_norm.bias": (8,),
    "indexer.weights_proj.weight": (2, H),
}
POOL: Shapes = {"indexer.index_kpool_compress_ape": (4, 8), "indexer.index_kpool_compress_gate": (8, H)}
NO_POSITIONS: Shapes = {"kv_a_proj_with_mqa.weight": (16, H), "q_b_proj.weight": (32, 16)}


def under(prefix: str, found: Shapes) -> Shapes:
    return {prefix + n: s for n, s in found.items()}


def gated(width: int, *names: str) -> Shapes:
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    return {f"{gate}.weight": (width, H), f"{up}.weight": (width, H), f"{down}.weight": (H, width)}


def experts(router: str, bias: str, shared: str, width: int = F, *names: str) -> Shapes:
    routed = {f"experts.{e}.{n}": s for e in range(E) for n, s in gated(F, *names).items()}
    return {f"{router}.weight": (E, H), bias: (E,), **routed, **under(f"{shared}.", gated(width))}


DEEPSEEK_MOE = experts("gate", "gate.e_score_correction_bias", "shared_experts")
NORMS: Shapes = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}


def depth(attention: Shapes, mlp: Shapes, final: str, *, attn: str = "self_attn", module: str = "mlp") -> Shapes:
    """One more layer: norms of embedding and hidden state, their projection, the layer, and a norm behind it."""
    fusion: Shapes = {"enorm.weight": (H,), "hnorm.weight": (H,), "eh_proj.weight": (H, 2 * H), f"{final}.weight": (H,)}
    return {**fusion, **NORMS, **under(f"{attn}.", attention), **under(f"{module}.", mlp)}


def minimax() -> Shapes:
    """Fusion and final norm at the depth, the layer below `transformer_layer`."""
    index: Shapes = {"index_q_proj.weight": (16, H), "index_k_proj.weight": (8, H)}
    index |= {"index_q_norm.weight": (8,), "index_k_norm.weight": (8,)}
    mlp = experts("gate", "e_score_correction_bias", "shared_experts", F, "w1", "w3", "w2")
    found = depth({**GQA, **QK_NORM, **index}, mlp, "final_layernorm", module="block_sparse_moe")
    outside = ("enorm", "hnorm", "eh_proj", "final_layernorm")
    return {n if n.startswith(outside) else f"transformer_layer.{n}": s for n, s in found.items()}


LONGCAT: Shapes = {
    "norm.weight": (H,),
    "layers.0.enorm.m.weight": (H,),
    "layers.0.hnorm.m.weight": (H,),
    "layers.0.eh_proj.weight": (H, 2 * H),
    **under("layers.0.", NORMS),
    **under("layers.0.self_attn.", LATENT),
    **under("layers.0.transformer_layer.mlp.", gated(48)),
}
HY = depth({**GQA, **QK_NORM}, experts("router.gate", "expert_bias", "shared_mlp", 2 * F), "final_layernorm")
LING_MOE = experts("gate", "gate.expert_bias", "shared_experts")
LING_QKV: Shapes = {"query_key_value.weight": (64, H), "query_key_value.bias": (64,), "dense.weight": (H, 32)}
LING: Shapes = {**LING_QKV, "query_layernorm.weight": (8,), "key_layernorm.weight": (8,)}
LING_LATENT: Shapes = {**LATENT_KV, "dense.weight": (H, 32)}
LING_3 = depth(
    {**LING_LATENT, "q_proj.weight": (48, H), "g_proj.weight": (4, H)}, LING_MOE, "final_layernorm", attn="attention"
)

DEPTHS: dict[str, Shapes] = {
    "glm4_moe": {
        n: s
        for k in (4, 5)
        for n, s in under(
            f"model.layers.{k}.", depth({**GQA, **QK_NORM, **BIASES}, DEEPSEEK_MOE, "shared_head.norm")
        ).items()
    },
    "glm4_moe_lite": under("model.layers.4.", depth(LATENT, DEEPSEEK_MOE, "shared_head.norm")),
    "glm_moe_dsa": under("model.layers.4.", depth({**LATENT, **INDEXER}, DEEPSEEK_MOE, "shared_head.norm")),
    "glm5_next": under(
        "model.language_model.layers.4.",
        depth({**LATENT, **NO_POSITIONS, **INDEXER, **POOL}, DEEPSEEK_MOE, "shared_head.norm"),
    ),
    "longcat_flash": under("model.mtp.", LONGCAT),
    "bailing_moe": under("model.layers.4.", depth(LING, LING_MOE, "final_layernorm", attn="attention")),
    "bailing_hybrid": under("model.layers.4.", LING_3),
    "bailing_hybrid 2.5": under(
        "model.layers.4.", depth({**LATENT_Q, **LING_LATENT}, LING_MOE, "final_layernorm", attn="attention")
    ),
    "hy_v3": under("model.layers.4.", HY),
    "minimax_m3": {n: s for k in (0, 1) for n, s in under(f"language_model.model.mtp.layers.{k}.", minimax()).items()},
}
COPIES = {
    **{
        name: [f"{at}.{n}.weight" for n in ("embed_tokens", "shared_head.head")]
        for name, at in {
            "glm4_moe_lite": "model.layers.4",
            "glm_moe_dsa": "model.layers.4",
            "glm5_next": "model.language_model.layers.4",
        }.items()
    },
    "glm4_moe": [f"model.layers.{k}.{n}.weight" for k in (4, 5) for n in ("embed_tokens", "shared_head.head")],
    "longcat_flash": ["model.mtp.embed_tokens.weight"],
}


@pytest.mark.parametrize("name", NAMES)
def test_mtp_names_are_those_of_the_releases(name: str) -> None:
    config = tiny(name)
    backbone, whole = layout(config, depths=0), layout(config)
    assert {n: s for n, s in shapes(whole).items() if n not in backbone.bindings} == DEPTHS[name]
    assert list(whole.copies) == COPIES.get(name, [])
    assert {whole.copy_binding(n).shape for n in whole.copies} <= {(V, H)}


def test_lightning_attention_has_the_released_names() -> None:
    """Ling-2.5, which transformers has not: a linear layer, dense, and a layer of latent attention with experts."""
    found = shapes(layout(tiny("bailing_hybrid 2.5", moe_router_enable_expert_bias=False), depths=0))
    qkv: Shapes = {"query_key_value.weight": (96, H), "query_layernorm.weight": (8,), "key_layernorm.weight": (8,)}
    linear: Shapes = {**qkv, "g_proj.weight": (32, H), "g_norm.weight": (32,), "dense.weight": (H, 32)}
    wanted = {**NORMS, **under("attention.", linear), **under("mlp.", gated(48))}
    assert {n: s for n, s in found.items() if ".layers.0." in n} == under("model.layers.0.", wanted)
    full = {**NORMS, **under("attention.", {**LATENT_Q, **LING_LATENT}), **under("mlp.", LING_MOE)}
    del full["mlp.gate.expert_bias"]
    assert {n: s for n, s in found.items() if ".layers.1." in n} == under("model.layers.1.", full)
    ends = {"model.word_embeddings.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    assert {n: s for n, s in found.items() if ".layers." not in n} == ends


SIZES: dict[str, dict[str, Any]] = {
    "torch_dist": {"to": "megatron"},
    "ranks": {
        "to": "megatron",
        "container": "legacy",
        "parallel": {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    },
    "native": {"to": "native"},
}
NO_RANKS = ("longcat_flash", "glm5_next")  # Megatron-Core has no such models, so there are no files of their ranks
WAYS = [(name, via) for name in NAMES for via in SIZES if via in ("torch_dist", "native") or name not in NO_RANKS]


@pytest.mark.parametrize(("name", "via"), WAYS)
def test_bytes_come_back(name: str, via: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny(name))
    convert(source, tmp_path / "there", **SIZES[via])
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


SPELLED: list[tuple[str, dict[str, str]]] = [
    ("glm4_moe", {"trunk": "model.language_model."}),
    ("glm4_moe", {"experts": "stacked"}),
    ("longcat_flash", {"experts": "stacked"}),
    ("bailing_hybrid", {"kda_out": "dense"}),
    ("minimax_m3", {"wrapper": ""}),
    ("minimax_m3", {"wrapper": "", "names": "transformers"}),
]


@pytest.mark.parametrize(("name", "words"), SPELLED, ids=str)
def test_other_spellings_are_recognised_and_come_back(name: str, words: dict[str, str], tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny(name), **words)
    assert open_checkpoint(source).layout.words.items() >= words.items()
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


@pytest.mark.parametrize("name", ["glm4_moe", "longcat_flash"])
def test_copies_come_back(name: str, tmp_path: Path) -> None:
    config = tiny(name)
    found = layout(config)
    tensors = random(found)
    for copy, param in found.copies.items():
        tensors[copy] = tensors[found.home[param][0].tensor].clone()
    source = hf_folder(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_holds_in_some_spelling(name: str) -> None:
    family, dims = family_of(tiny(name))
    for place in family.places(dims):
        for lay, rows in place.block.rows.items():
            wanted = {pair for row in rows for pair in row.when.items()}
            assert wanted <= {(word, s) for word, spellings in family.choices[lay].items() for s in spellings}
