"""GLM, LongCat, Ling, HY and MiniMax-M3: which number goes where, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _glm_tiny import Shapes, folder, layout, random, shapes, text, tiny
from _kit import Config, Tensors, convert, differing, hf_folder
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint

A = "self_attention."


def native_and_source(config: Config, scratch: Path) -> tuple[Tensors, Tensors]:
    source = folder(scratch / "source", config)
    convert(source, scratch / "there", "native")
    return load_file(scratch / "there" / "model.safetensors"), load_file(source / "model.safetensors")


def rank_and_source(config: Config, scratch: Path, tensor: int = 1) -> tuple[list[Tensors], Tensors]:
    """What every tensor-parallel rank holds in Megatron's names, and what it was made of."""
    source = folder(scratch / "source", config)
    convert(source, scratch / "there", "megatron", container="legacy", parallel={"tensor": tensor})
    files = sorted((scratch / "there").rglob("mp_rank_*/*.pt"))
    models = [torch.load(file, weights_only=False)["model"] for file in files]
    ranks = [{n: t for n, t in m.items() if isinstance(t, Tensor) and "_extra_state" not in n} for m in models]
    return ranks, load_file(source / "model.safetensors")


def groups(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """[q; k; v] per group."""
    runs = zip(q.chunk(count), k.chunk(count), v.chunk(count), strict=True)
    return torch.cat([x for run in runs for x in run])


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_ling_fuses_all_queries_then_all_keys_then_all_values(kind: str, tmp_path: Path) -> None:
    (there,), source = rank_and_source(tiny("bailing_moe"), tmp_path)
    for inner, layer in (("decoder.layers.0.", 0), ("mtp.layers.0.mtp_model_layer.", 4)):
        q, k, v = source[f"model.layers.{layer}.attention.query_key_value.{kind}"].split([32, 16, 16])
        assert torch.equal(there[f"{inner}{A}linear_qkv.{kind}"], groups(q, k, v, 2))


def test_lightning_attention_is_named_as_in_mcore_bridge(tmp_path: Path) -> None:
    """Its heads are cut; the norm of its output is whole on every rank."""
    ranks, source = rank_and_source(tiny("bailing_hybrid 2.5"), tmp_path, tensor=2)
    at = "model.layers.0."
    qkv = [part.chunk(2) for part in source[f"{at}attention.query_key_value.weight"].chunk(3)]
    for rank, there in enumerate(ranks):
        found = {n.removeprefix("decoder.layers.0."): t for n, t in there.items() if n.startswith("decoder.layers.0.")}
        attention = {n: t for n, t in found.items() if not n.startswith("mlp.")}
        assert attention.keys() == {
            "input_layernorm.weight",
            *(
                f"{A}{n}.weight"
                for n in ("linear_qkv", "linear_proj", "g_proj", "g_norm", "q_layernorm", "k_layernorm")
            ),
        }
        assert torch.equal(found[f"{A}linear_qkv.weight"], groups(*(part[rank] for part in qkv), 2))
        assert torch.equal(found[f"{A}g_proj.weight"], source[f"{at}attention.g_proj.weight"].chunk(2)[rank])
        assert torch.equal(found[f"{A}g_norm.weight"], source[f"{at}attention.g_norm.weight"])


KIMI = ("q", "k", "v", "f", "g")  # parts of Megatron's input projection; f forgets, g gates the output


def test_kimi_delta_attention_fuses_its_inputs_rank_by_rank(tmp_path: Path) -> None:
    ranks, source = rank_and_source(tiny("bailing_hybrid"), tmp_path, tensor=2)
    at = "model.layers.0.attention."
    for rank, there in enumerate(ranks):
        fused = torch.cat([source[f"{at}{p}_proj.weight"].chunk(2)[rank] for p in KIMI])
        assert torch.equal(there[f"decoder.layers.0.{A}in_proj.weight"], fused)
        kernels = torch.cat([source[f"{at}{p}_conv1d.weight"].chunk(2)[rank] for p in "qkv"])
        assert torch.equal(there[f"decoder.layers.0.{A}conv1d.weight"], kernels)
        assert torch.equal(there[f"decoder.layers.0.{A}beta_proj.weight"], source[f"{at}b_proj.weight"])
        for name in ("A_log", "dt_bias"):
            assert torch.equal(there[f"decoder.layers.0.{A}{name}"], source[at + name].chunk(2)[rank])


def test_kimi_delta_attention_has_the_names_of_the_development_branch() -> None:
    found = shapes(layout(tiny("bailing_hybrid"), "megatron"))
    head = f"decoder.layers.0.{A}"
    names = {n.removeprefix(head) for n in found if n.startswith(head)}
    inputs = {f"in_proj.weight.{n}" for n in ("query", "key", "value", "g", "gate")}
    kernels = {f"conv1d.weight.{n}" for n in ("query", "key", "value")}
    own = {"A_log", "dt_bias", "beta_proj.weight", "out_norm.weight", "out_proj.weight"}
    assert names == inputs | kernels | own
    ranked = shapes(layout(tiny("glm5_next"), "megatron"))
    head = f"decoder.layers.0.inner_layer.{A}"
    names = {n.removeprefix(head) for n in ranked if n.startswith(head)}
    gates = {f"{g}_{part}_proj.weight" for g in "fg" for part in "ab"}
    assert names == inputs - {"in_proj.weight.g", "in_proj.weight.gate"} | kernels | own | gates


def test_native_kimi_delta_attention_holds_one_convolution(tmp_path: Path) -> None:
    native, source = native_and_source(tiny("bailing_hybrid"), tmp_path)
    at = "model.layers.0.attention."
    kernels = torch.cat([source[f"{at}{p}_conv1d.weight"] for p in "qkv"])
    assert torch.equal(native["model.layers.0.self_attn.conv1d.weight"], kernels)
    assert torch.equal(native["model.layers.0.self_attn.forget_gate.f_proj.weight"], source[f"{at}f_proj.weight"])


def test_shared_indexers_are_absent_and_norms_stay_apart(tmp_path: Path) -> None:
    """The names that megatron-core 0.19.2 gave a model of this config, and loaded."""
    found = layout(tiny("glm_moe_dsa"), "megatron")
    indexers = {n for n in found.bindings if ".indexer." in n}
    names = ("linear_wq_b.weight", "linear_wk.weight", "k_norm.weight", "k_norm.bias", "linear_weights_proj.weight")
    heads = [*(f"decoder.layers.{i}." for i in (0, 1, 3)), "mtp.layers.0.transformer_layer."]
    assert indexers == {f"{head}{A}core_attention.indexer.{n}" for head in heads for n in names}
    for head in (*heads, "decoder.layers.2."):
        assert f"{head}{A}q_layernorm.weight" in found.bindings
        assert f"{head}{A}kv_layernorm._extra_state/shard_0_1" in found.objects


def test_longcat_halves_are_layers_of_their_own(tmp_path: Path) -> None:
    found = layout(tiny("longcat_flash"), "megatron")
    native, source = native_and_source(tiny("longcat_flash"), tmp_path)
    for pair in (0, 1):
        for half in (0, 1):
            i, at = 2 * pair + half, f"model.layers.{pair}."
            expected = {
                f"{at}input_layernorm.{half}.weight": f"decoder.layers.{i}.input_layernorm.weight",
                f"{at}self_attn.{half}.q_b_proj.weight": f"decoder.layers.{i}.{A}linear_q_up_proj.weight",
                f"{at}post_attention_layernorm.{half}.weight": f"decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
                f"{at}mlps.{half}.down_proj.weight": f"decoder.layers.{i}.mlp.linear_fc2.weight",
            }
            for name, megatron in expected.items():
                (part,) = layout(tiny("longcat_flash")).bindings[name].parts
                assert found.home[part.param][0].tensor == megatron
                assert torch.equal(native[name], source[name])
    shortcut = {n: s for n, s in shapes(found).items() if "shortcut_mlp" in n and ".router." in n}
    assert shortcut == {
        f"decoder.layers.{i}.shortcut_mlp.router.{n}": s
        for i in (0, 2)
        for n, s in {"weight": (6, 32), "expert_bias": (6,)}.items()
    }


def test_several_depths_of_longcat_have_a_norm_each() -> None:
    one, two = (layout(tiny("longcat_flash"), depths=n) for n in (1, 2))
    assert "model.mtp.norm.weight" in one.bindings
    assert {"model.mtp.layers.0.norm.weight", "model.mtp.layers.1.norm.weight"} <= two.bindings.keys()
    assert "model.mtp.layers.1.embed_tokens.weight" in two.copies


def test_minimax_fuses_gate_and_up_and_keeps_indexers_beside_the_model(tmp_path: Path) -> None:
    native, source = native_and_source(tiny("minimax_m3"), tmp_path)
    at = "language_model.model.layers."
    dense = torch.cat([source[f"{at}0.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(native["model.layers.0.mlp.gate_up_proj.weight"], dense)
    routed = [[source[f"{at}1.block_sparse_moe.experts.{e}.{w}.weight"] for w in ("w1", "w3")] for e in range(4)]
    assert torch.equal(native["model.layers.1.mlp.experts.gate_up_proj"], torch.stack([torch.cat(x) for x in routed]))
    shared = torch.cat([source[f"{at}1.block_sparse_moe.shared_experts.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(native["model.layers.1.mlp.shared_experts.gate_up_proj.weight"], shared)
    found = shapes(layout(tiny("minimax_m3"), "megatron"))
    index: Shapes = {"q_proj.weight": (16, 32), "k_proj.weight": (8, 32), "q_norm.weight": (8,), "k_norm.weight": (8,)}
    heads = [*(f"lightning_indexers.{i}." for i in (1, 2, 3))]
    heads += [f"mtp.layers.{k}.transformer_layer.lightning_indexer." for k in (0, 1)]
    assert {n: s for n, s in found.items() if "indexer" in n} == {h + n: s for h in heads for n, s in index.items()}
    wrapped = layout(tiny("minimax_m3"), "megatron", wrapper="language_model.").bindings
    assert "language_model.decoder.layers.1.mlp.router.weight" in wrapped
    assert "lightning_indexers.1.q_proj.weight" in wrapped


@pytest.mark.parametrize(("stored", "declared"), [(0, 1), (2, 1), (1, 0)])
def test_minimax_counts_stored_depths_whatever_its_config_says(stored: int, declared: int, tmp_path: Path) -> None:
    """Releases may declare modules that they do not store."""
    config = tiny("minimax_m3", num_mtp_modules=declared)
    source = folder(tmp_path / "source", config, depths=stored)
    assert open_checkpoint(source).dims.depths == stored
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    changed = ["config.json"] if stored else []  # where there are depths, the config is corrected
    assert differing(source, tmp_path / "back") == changed


def test_hyper_connections_keep_three_scales(tmp_path: Path) -> None:
    config = tiny("glm5_next")
    source = folder(tmp_path / "source", config)
    convert(source, tmp_path / "there", "megatron")
    found = layout(config, "megatron")
    for i, name in ((0, "attn"), (1, "ffn")):
        scales = [f"decoder.layers.{i}.hyper_connection.alpha_{s}" for s in ("pre", "post", "res")]
        (binding,) = (b for b in layout(config).bindings.values() if b.tensor.endswith(f".0.hc_{name}_scale"))
        assert [found.home[p.param][0].tensor for p in binding.parts] == scales
        assert binding.shape == (3,)
    mapping = found.bindings["decoder.layers.3.hyper_connection.mapping_proj.weight"]
    assert mapping.parts[0].param == layout(config).bindings["model.language_model.layers.1.hc_ffn_fn"].parts[0].param


KEPT: dict[str, tuple[str, ...]] = {
    "glm4_moe": ("e_score_correction_bias",),
    "longcat_flash": ("e_score_correction_bias", "classifier.weight"),
    "bailing_hybrid": ("expert_bias", "mlp.gate.weight", "A_log", "dt_bias", "_conv1d.weight"),
    "bailing_hybrid 2.5": (),
    "hy_v3": ("expert_bias",),
    "minimax_m3": ("e_score_correction_bias", "block_sparse_moe.gate.weight"),
    "glm5_next": ("e_score_correction_bias", "A_log", "dt_bias", "_conv1d.weight", "_fn", "_base", "_scale"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_released_in_float32_stays_so(name: str, tmp_path: Path) -> None:
    more = {"moe_router_enable_expert_bias": False} if name.endswith("2.5") else {}
    config = tiny(name, **more)
    found = layout(config)
    tensors = {n: t.float() for n, t in random(found).items()}
    source = hf_folder(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "there", "megatron", dtype="bf16")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    back: dict[str, Any] = load_file(tmp_path / "back" / "model.safetensors")
    kept = {n for n, t in back.items() if t.dtype == torch.float32}
    assert kept == {n for n in back if n.endswith(KEPT[name])}
    assert text(config)["hidden_size"] == 32
