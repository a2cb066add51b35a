"""MiMo, MiMo-V2, Step, ERNIE and Inkling: names against transformers and the releases, bytes there and back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _kit import Tensors, convert, differing
from _mimo_tiny import NAMES, Shapes, folder, layout, shapes, tiny
from safetensors.torch import load_file
from torch import nn

from mtp_convert.checkpoint import open_checkpoint

TOWERS = ("model.audio", "model.vision", "model.visual", "model.multi_modal", "vision_model.", "vit_large_projector.")


@cache
def model(name: str) -> nn.Module:
    """transformers' own model of the tiny config, without the towers that take scipy."""
    import transformers as t
    from transformers.models.inkling import modeling_inkling

    config = tiny(name)
    if name == "mimo":
        known = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        return t.Qwen2ForCausalLM(t.Qwen2Config(**known))
    if name == "mimo_v2_flash":
        return t.MiMoV2FlashForCausalLM(t.MiMoV2FlashConfig(**config))
    if name == "ernie4_5_moe":
        return t.Ernie4_5_MoeForCausalLM(t.Ernie4_5_MoeConfig(**config))
    if name == "step3p5":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        return t.Step3p7ForConditionalGeneration(t.Step3p7Config(text_config=config, vision_config=vision))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_inkling, "InklingVisionModel", lambda _: nn.Module())
        audio = {"n_mel_bins": 4, "mel_vocab_size": 4}
        return t.InklingForConditionalGeneration(t.InklingConfig(**config, audio_config=audio))


def language(tensors: Tensors) -> Shapes:
    return {n: tuple(t.shape) for n, t in tensors.items() if not n.startswith(TOWERS)}


@pytest.mark.parametrize("name", NAMES)
def test_backbone_names_are_what_transformers_saves(name: str, tmp_path: Path) -> None:
    model(name).save_pretrained(tmp_path)  # type: ignore[operator]
    assert language(load_file(tmp_path / "model.safetensors")) == shapes(layout(tiny(name), depths=0))


@pytest.mark.parametrize("name", NAMES)
def test_native_names_are_what_transformers_holds(name: str) -> None:
    held = {n.replace("model.language_model.", "model."): t for n, t in model(name).state_dict().items()}
    native = layout(tiny(name), "native", depths=0)
    assert language(held) == shapes(native) | {n: native.copy_binding(n).shape for n in native.copies}


H, F, V = 16, 24, 64
GQA = {"q": (32, H), "k": (16, H), "v": (16, H), "o": (H, 32)}  # 4 and 2 heads of 8
DENSE = {"gate": (F, H), "up": (F, H), "down": (H, F)}


def llama(prefix: str, attention: Shapes, norms: tuple[str, str]) -> Shapes:
    """A dense decoder layer."""
    found = {f"{prefix}self_attn.{p}_proj.weight": s for p, s in attention.items()}
    found |= {f"{prefix}mlp.{p}_proj.weight": s for p, s in DENSE.items()}
    return found | {f"{prefix}{n}.weight": (H,) for n in norms}


def vectors(prefix: str, *names: str) -> Shapes:
    return {f"{prefix}{n}.weight": (H,) for n in names}


LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def mimo_depth(k: int) -> Shapes:
    p = f"model.mtp_layers.{k}."
    biases = {f"{p}self_attn.{x}_proj.bias": GQA[x][:1] for x in "qkv"}
    fusion = {
        **vectors(p, "token_layernorm", "hidden_layernorm", "final_layernorm"),
        f"{p}input_proj.weight": (H, 2 * H),
    }
    return llama(p, GQA, LLAMA_NORMS) | biases | fusion


def flash_depth(k: int) -> Shapes:
    p = f"model.mtp.layers.{k}."
    window = {"q": (48, H), "k": (48, H), "v": (32, H), "o": (H, 32)}  # 4 and 4 heads of 12 and 8
    fusion = {**vectors(p, "enorm", "hnorm", "final_layernorm"), f"{p}eh_proj.weight": (H, 2 * H)}
    sink = {f"{p}self_attn.attention_sink_bias": (4,)}
    return llama(p, window, ("input_layernorm", "pre_mlp_layernorm")) | fusion | sink


def step_depth(k: int) -> Shapes:
    p, heads = f"model.layers.{4 + k}.", 6 if k == 0 else 4  # the first depth has a window
    own = {"q": (heads * 8, H), "k": (16, H), "v": (16, H), "g": (heads, H), "o": (H, heads * 8)}
    fusion = {**vectors(p, "enorm", "hnorm", "transformer.shared_head.norm"), f"{p}eh_proj.weight": (H, 2 * H)}
    norms: Shapes = {f"{p}self_attn.{x}_norm.weight": (8,) for x in "qk"}
    return llama(p, own, LLAMA_NORMS) | fusion | norms | {f"{p}transformer.shared_head.output.weight": (V, H)}


def ernie_depth(k: int) -> Shapes:
    fusion = {
        **vectors("model.", f"mtp_emb_norm.{k}", f"mtp_hidden_norm.{k}"),
        f"model.mtp_linear_proj.{k}.weight": (H, 2 * H),
    }
    return llama(f"model.mtp_block.{k}.", GQA, LLAMA_NORMS) | fusion


def inkling_depth(k: int) -> Shapes:
    p = f"model.mtp.layers.{k}."
    kv, extent = (32, 8) if k == 1 else (16, 16)  # the second depth has a window
    block: Shapes = {
        "attn_norm.weight": (H,),
        "attn.wq_du.weight": (32, H),
        "attn.wk_dv.weight": (kv, H),
        "attn.wv_dv.weight": (kv, H),
        "attn.wr_du.weight": (16, H),
        "attn.wo_ud.weight": (H, 32),
        "attn.q_norm.weight": (8,),
        "attn.k_norm.weight": (8,),
        "attn.k_sconv.weight": (kv, 1, 4),
        "attn.v_sconv.weight": (kv, 1, 4),
        "attn.rel_logits_proj.proj": (4, extent),
        "attn_sconv.weight": (H, 1, 4),
        "mlp_norm.weight": (H,),
        "mlp.w13_dn.weight": (2 * F, H),
        "mlp.w2_md.weight": (H, F),
        "mlp.global_scale": (1,),
        "mlp_sconv.weight": (H, 1, 4),
    }
    fusion = {**vectors(p, "embed_norm", "hidden_norm"), f"{p}input_proj.weight": (H, 2 * H)}
    return {f"{p}transformer_block.{n}": s for n, s in block.items()} | fusion


DEPTHS = {
    "mimo": [mimo_depth(0), mimo_depth(1)],
    "mimo_v2_flash": [flash_depth(0), flash_depth(1)],
    "step3p5": [step_depth(0), step_depth(1)],
    "ernie4_5_moe": [ernie_depth(0)],
    "inkling": [inkling_depth(0), inkling_depth(1), {"model.mtp.chain_norm.weight": (H,)}],
}


@pytest.mark.parametrize("name", NAMES)
def test_mtp_names_are_those_of_the_releases(name: str) -> None:
    config = tiny(name)
    backbone, whole = shapes(layout(config, depths=0)), shapes(layout(config))
    expected: Shapes = {}
    for depth in DEPTHS[name]:
        expected |= depth
    assert {n: s for n, s in whole.items() if n not in backbone} == expected


SIZES = {"tensor": 2, "pipeline": 2}
EXPERT_SIZES = {**SIZES, "expert": 2, "expert_tensor": 1}
LEGACY: dict[str, dict[str, Any]] = {  # Megatron has no Inkling, so there are no files of its ranks
    name: {"container": "legacy", "parallel": SIZES if name == "mimo" else EXPERT_SIZES} for name in NAMES[:-1]
}
WAYS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, via, {}) for name in NAMES for via in ("megatron", "native")),
    *((name, "megatron", options) for name, options in LEGACY.items()),
]


@pytest.mark.parametrize(("name", "via", "options"), WAYS, ids=str)
def test_bytes_come_back(name: str, via: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny(name))
    convert(source, tmp_path / "there", via, **options)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


SPELLED: list[tuple[str, dict[str, str]]] = [
    ("mimo", {"trunk": "model.language_model."}),
    ("mimo_v2_flash", {"qkv": "fused"}),
    ("mimo_v2_flash", {"experts": "stacked"}),
    ("step3p5", {"heads": "shared"}),
    ("step3p5", {"trunk": "model.language_model.", "heads": "shared"}),
    ("ernie4_5_moe", {"experts": "stacked"}),
]


@pytest.mark.parametrize(("name", "words"), SPELLED, ids=str)
def test_other_spellings_are_recognised_and_come_back(name: str, words: dict[str, str], tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny(name), **words)
    assert open_checkpoint(source).layout.words.items() >= words.items()
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


OTHER: list[tuple[str, dict[str, Any], int]] = [  # tensors more or less than the tiny config has
    ("mimo", {"model_type": "qwen2", "tie_word_embeddings": True, "num_nextn_predict_layers": None}, -1 - 32),
    ("mimo_v2_flash", {"attention_bias": True, "add_full_attention_sink_bias": True}, 3 * 6 + 2),
    ("mimo_v2_flash", {"attention_bias": True, "attention_projection_layout": "fused_qkv"}, -6),
    ("step3p5", {"use_qk_norm": False, "use_head_wise_attn_gate": False, "use_moe_router_bias": False}, -3 * 6 - 3),
    ("step3p5", {"tie_word_embeddings": True}, -1),
    ("ernie4_5_moe", {"tie_word_embeddings": False, "moe_num_shared_experts": 0}, 1 - 3 * 3),
    ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_end_index": 2}, -2 * (17 - 3)),
    ("inkling", {"mtp_config": {"num_nextn_predict_layers": 1}}, -20 - 1),
]


@pytest.mark.parametrize(("name", "change", "more"), OTHER, ids=str)
def test_models_with_other_parts(name: str, change: dict[str, Any], more: int, tmp_path: Path) -> None:
    config = tiny(name, **change)
    source = folder(tmp_path / "source", config)
    assert len(layout(config).bindings) == len(layout(tiny(name)).bindings) + more
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []
