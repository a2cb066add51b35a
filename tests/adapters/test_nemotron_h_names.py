"""Nemotron-H names and shapes against what the defining tools wrote: AutoModel, transformers and Megatron-Core."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mtp_convert.adapters import find
from mtp_convert.containers import torch_dist
from mtp_convert.mapping.layout import Layout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
AUTOMODEL = sorted(p.parent for p in GOLDEN.glob("automodel/nemotron*/config.json"))
MEGATRON = sorted(p.parent for p in GOLDEN.glob("megatron/hyb*/config.json"))
Shapes = dict[str, tuple[int, ...]]


def layout(config: dict[str, Any], name: str, depths: int | None = None, **words: str) -> Layout:
    family, section = find(config)
    assert section == ()
    depths = family.depths.declared(config) if depths is None else depths
    return family.layout(name, family.dims(config, depths), words)


def shapes(layout: Layout) -> Shapes:
    return {n: b.shape for n, b in layout.bindings.items()}


def file_shapes(path: Path) -> Shapes:
    with safe_open(path, "pt") as file:
        return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("folder", AUTOMODEL, ids=lambda p: p.name)
def test_names_and_shapes_equal_automodel(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert shapes(layout(config, "hf")) == file_shapes(folder / "model.safetensors")


@pytest.mark.parametrize("folder", MEGATRON, ids=lambda p: p.name)
def test_names_shapes_and_objects_equal_megatron(folder: Path) -> None:
    """Every tensor with its shape, and every `_extra_state` object that strict loading asks for."""
    config = json.loads((folder / "config.json").read_text())
    made = json.loads((folder / "model.json").read_text())
    stored = torch_dist.read(next((folder / "ckpt").glob("iter_*")))
    depths = len({n.split(".")[2] for n in stored.tensors if n.startswith("mtp.layers.")})
    ours = layout(config, "megatron", depths)
    assert shapes(ours) == {n: t.shape for n, t in stored.tensors.items()}
    assert set(ours.objects) == stored.objects
    assert len(set(ours.objects)) == len(ours.objects)
    assert made


def tiny(pattern: str, **changes: object) -> dict[str, Any]:
    """A config of transformers' own class with a pattern of letters."""
    words = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    return {
        "model_type": "nemotron_h",
        "layers_block_type": [words[x] for x in pattern],
        "vocab_size": 40,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 14,
        **changes,
    }


@pytest.mark.parametrize(
    "config",
    [
        tiny("M*E-ME"),
        tiny("*-*-"),
        tiny("MM"),
        tiny("E*E", moe_latent_size=8),
        tiny("*-M", mlp_bias=True),
        tiny("M*", n_groups=4, head_dim=4, conv_kernel=3),
        tiny("*E", num_key_value_heads=4),
    ],
    ids=lambda c: "-".join([*(w[:2] for w in c["layers_block_type"]), *(k for k in c if "bias" in k or "latent" in k)]),
)
def test_names_and_shapes_equal_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """Without MTP, which transformers does not have; save_pretrained writes the released names."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    fields = {k: v for k, v in config.items() if k != "model_type"}
    NemotronHForCausalLM(NemotronHConfig(**fields, use_mamba_kernels=False)).save_pretrained(tmp_path)
    written = file_shapes(tmp_path / "model.safetensors")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert shapes(layout(config, "hf", 0)) == written  # the fields as given ..
    assert shapes(layout(saved, "hf", 0)) == written  # .. and as transformers spells them


def test_attention_bias_adds_what_transformers_leaves_out() -> None:
    """transformers 5.23 accepts the field and builds no bias; the original code of the family builds four."""
    plain, biased = (shapes(layout(tiny("*-ME", attention_bias=x), "hf", 0)) for x in (False, True))
    added = {f"backbone.layers.0.mixer.{p}_proj.bias": (n,) for p, n in zip("qkvo", (24, 12, 12, 16), strict=True)}
    assert biased == plain | added


def test_a_tied_head_is_a_copy() -> None:
    config = tiny("*-", tie_word_embeddings=True)
    for name, head in (("hf", "lm_head.weight"), ("megatron", "output_layer.weight")):
        tied = layout(config, name, 0)
        assert head not in tied.bindings
        assert tied.copies == {head: "embedding"}
        untied = layout(config | {"tie_word_embeddings": False}, name, 0)
        assert head in untied.bindings
        assert not untied.copies


def test_every_param_has_one_home_in_every_layout() -> None:
    config = tiny("M*E-", moe_latent_size=8, attention_bias=True, mtp_layers_block_type=["attention", "moe"])
    hf, megatron = layout(config, "hf", 2), layout(config, "megatron", 2)
    assert hf.params.keys() == megatron.params.keys() == hf.home.keys() == megatron.home.keys()
    assert {n for n, p in hf.params.items() if p.vocab} == {"embedding", "head"}
    high = {n.rsplit(".", 1)[-1] for n, p in hf.params.items() if p.high_precision}
    assert high == {"router_bias", "A_log", "D", "dt_bias"}


def test_the_flat_index_of_hugging_face_counts_sub_layers() -> None:
    config = tiny("M", mtp_layers_block_type=["attention", "moe", "mlp"])
    ours = shapes(layout(config, "hf", 2))
    for f, first, last in ((0, True, False), (1, False, False), (2, False, True), (3, True, False), (5, False, True)):
        assert (f"mtp.layers.{f}.enorm.weight" in ours) == first
        assert (f"mtp.layers.{f}.eh_proj.weight" in ours) == first
        assert (f"mtp.layers.{f}.final_layernorm.weight" in ours) == last
    assert "mtp.layers.3.mixer.q_proj.weight" in ours
    assert "mtp.layers.5.mixer.up_proj.weight" in ours
    assert not any(n.startswith("mtp.layers.6") for n in ours)
