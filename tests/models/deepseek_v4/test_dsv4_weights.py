"""Reading Hugging Face folders of DeepSeek-V4, in every spelling, and refusing the rest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _dsv4 import D1, D2, golden, predictions, run, training
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM as TransformersModel

from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the golden folder whose MTP has every kind of layer."""
    return Path(shutil.copytree(D2, tmp_path / "model", ignore=shutil.ignore_patterns("native*", "io*")))


# Sizes of the folder: H hidden, V vocabulary, X streams, A heads, F head features, Q query rank, G * L output rank,
# M indexer heads, J their features, E experts, K expert size, R ratio.
H, V, X, A, F, Q, G, L, M, J, E, K, R = 32, 64, 4, 4, 16, 24, 2, 12, 2, 12, 8, 32, 4
MTP_WITH_COMPRESSOR: dict[str, tuple[int, ...]] = {
    "enorm.weight": (H,),
    "hnorm.weight": (H,),
    "e_proj.weight": (H, H),
    "h_proj.weight": (H, H),
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
    "attn_hc.fn": ((2 + X) * X, X * H),
    "attn_hc.base": ((2 + X) * X,),
    "attn_hc.scale": (3,),
    "ffn_hc.fn": ((2 + X) * X, X * H),
    "ffn_hc.base": ((2 + X) * X,),
    "ffn_hc.scale": (3,),
    "self_attn.q_a_proj.weight": (Q, H),
    "self_attn.q_a_norm.weight": (Q,),
    "self_attn.q_b_proj.weight": (A * F, Q),
    "self_attn.kv_proj.weight": (F, H),
    "self_attn.kv_norm.weight": (F,),
    "self_attn.o_a_proj.weight": (G * L, A * F // G),
    "self_attn.o_b_proj.weight": (H, G * L),
    "self_attn.sinks": (A,),
    "self_attn.compressor.kv_proj.weight": (2 * F, H),
    "self_attn.compressor.gate_proj.weight": (2 * F, H),
    "self_attn.compressor.position_bias": (R, 2 * F),
    "self_attn.compressor.kv_norm.weight": (F,),
    "self_attn.compressor.indexer.kv_proj.weight": (2 * J, H),
    "self_attn.compressor.indexer.gate_proj.weight": (2 * J, H),
    "self_attn.compressor.indexer.position_bias": (R, 2 * J),
    "self_attn.compressor.indexer.kv_norm.weight": (J,),
    "self_attn.compressor.indexer.q_b_proj.weight": (M * J, Q),
    "self_attn.compressor.indexer.scorer.weights_proj.weight": (M, H),
    "mlp.gate.weight": (E, H),
    "mlp.gate.e_score_correction_bias": (E,),
    "mlp.experts.gate_up_proj": (E, 2 * K, H),
    "mlp.experts.down_proj": (E, H, K),
    "mlp.shared_experts.gate_proj.weight": (K, H),
    "mlp.shared_experts.up_proj.weight": (K, H),
    "mlp.shared_experts.down_proj.weight": (H, K),
    "hc_head.hc_fn": (X, X * H),
    "hc_head.hc_base": (X,),
    "hc_head.hc_scale": (1,),
    "norm.weight": (H,),
}


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def assert_same_state(folder: Path) -> None:
    expected = training(D2).state_dict()
    state = DeepseekV4ForCausalLM.from_pretrained(folder).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_names_and_shapes_of_the_tree() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in training(D2).state_dict().items()}
    depths = [
        {n.removeprefix(p): s for n, s in shapes.items() if n.startswith(p)} for p in ("mtp.layers.0.", "mtp.layers.1.")
    ]
    assert depths[0] == MTP_WITH_COMPRESSOR
    assert depths[1] == {n: s for n, s in MTP_WITH_COMPRESSOR.items() if ".compressor." not in n}
    layer = {n.removeprefix("model.layers.1."): s for n, s in shapes.items() if n.startswith("model.layers.1.")}
    fusion = ("enorm.", "hnorm.", "e_proj.", "h_proj.", "hc_head.", "norm.")
    assert layer == {n: s for n, s in MTP_WITH_COMPRESSOR.items() if not n.startswith(fusion)}
    hashed = {n: s for n, s in shapes.items() if n.startswith("model.layers.0.mlp.gate.")}
    assert hashed == {"model.layers.0.mlp.gate.weight": (E, H), "model.layers.0.mlp.gate.tid2eid": (V, 2)}
    top = {n: s for n, s in shapes.items() if ".layers." not in n}
    assert top == {
        "model.embed_tokens.weight": (V, H),
        "model.hc_head.hc_fn": (X, X * H),
        "model.hc_head.hc_base": (X,),
        "model.hc_head.hc_scale": (1,),
        "model.norm.weight": (H,),
        "lm_head.weight": (V, H),
    }


def test_released_state_is_the_file_again() -> None:
    stored = load_file(D2 / "model.safetensors")
    released = DeepseekV4ForCausalLM.from_pretrained(D2).released_state()
    assert list(released) == sorted(stored)
    assert all(torch.equal(released[name], stored[name]) for name in stored)
    assert all(tensor.is_contiguous() for tensor in released.values())


def test_names_that_transformers_writes(folder: Path) -> None:
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("mtp.")}
    TransformersModel.from_pretrained(folder).save_pretrained(folder.parent / "written")
    written = load_file(folder.parent / "written" / "model.safetensors")
    assert "model.layers.0.attn.norm.weight" in written  # not a released name
    assert not any(name.startswith("mtp.") for name in written)
    save_file(written | kept, folder / "model.safetensors")
    assert_same_state(folder)


def test_names_of_the_tree_itself(folder: Path) -> None:
    save_file(DeepseekV4ForCausalLM.from_pretrained(D2).state_dict(), folder / "model.safetensors")
    assert_same_state(folder)


@pytest.mark.parametrize("prefix", ["layers", "model.layers"])
def test_depths_named_like_further_layers(folder: Path, prefix: str) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("mtp.")]:
            _, depth, rest = name.split(".", 2)
            tensors[f"{prefix}.{4 + int(depth)}.{rest}"] = tensors.pop(name)

    rewrite(folder, rename)
    assert_same_state(folder)


def test_several_files_with_an_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{len(name) % 3}.safetensors" for name in tensors}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in tensors if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_state(folder)


def test_an_index_may_not_leave_its_folder(folder: Path) -> None:
    index = {"weight_map": {"head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        DeepseekV4ForCausalLM.from_pretrained(folder)


def test_a_tensor_may_not_be_in_two_files(folder: Path) -> None:
    save_file({"head.weight": torch.zeros(64, 32)}, folder / "other.safetensors")
    index = {"weight_map": {"embed.weight": "model.safetensors", "head.weight": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"more than one file: \['head.weight'\]"):
        DeepseekV4ForCausalLM.from_pretrained(folder)


def test_all_problems_are_named_together(folder: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["mtp.2.norm.weight"] = tensors.pop("mtp.1.ffn.experts.3.w3.weight")
        tensors["mtp.0.e_proj.weight"] = tensors["mtp.0.e_proj.weight"][:, :30]
        tensors["mtp.1.hc_head_base"] = tensors["mtp.1.hc_head_base"].long()
        tensors["model.norm.weight"] = tensors["norm.weight"].clone()

    rewrite(folder, damage)
    with pytest.raises(ValueError) as caught:
        DeepseekV4ForCausalLM.from_pretrained(folder)
    for problem in (
        "tensors missing: ['mtp.1.ffn.experts.3.w3.weight']",
        "tensors unexpected: ['model.norm.weight', 'mtp.2.norm.weight']",
        "given twice: ['model.norm.weight', 'norm.weight']",
        "mtp.0.e_proj.weight has shape (32, 30), expected (32, 32)",
        "mtp.1.hc_head_base is I64, expected floating point",
    ):
        assert problem in str(caught.value)


def test_a_folder_that_lost_its_mtp_is_refused_with_a_hint(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("mtp.")])
    with pytest.raises(ValueError, match=r"missing: \['mtp\.0.*give num_nextn_predict_layers=0"):
        DeepseekV4ForCausalLM.from_pretrained(folder)
    ids = golden(D2)["input_ids"]
    backbone = DeepseekV4ForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0)
    assert torch.equal(run(backbone, ids).logits, run(training(D2), ids).logits)


def test_fewer_depths_than_stored_may_be_asked_for() -> None:
    ids = golden(D2)["input_ids"]
    one = predictions(run(training(D2, num_nextn_predict_layers=1), ids))
    assert len(one) == 2
    assert torch.equal(one[1], predictions(run(training(D2), ids))[1])


def test_copies_of_embedding_and_head_are_accepted_if_they_are_copies(folder: Path) -> None:
    def copy(tensors: Tensors) -> None:
        tensors["mtp.1.emb.tok_emb.weight"] = tensors["embed.weight"].clone()
        tensors["mtp.1.head.weight"] = tensors["head.weight"].clone()

    rewrite(folder, copy)
    assert_same_state(folder)
    rewrite(folder, lambda tensors: tensors["mtp.1.head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"mtp\.1\.head\.weight differs from lm_head\.weight"):
        DeepseekV4ForCausalLM.from_pretrained(folder)


def test_a_table_of_experts_may_be_int32_and_must_be_valid(folder: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    tensors = rewrite(folder, lambda tensors: tensors.update({name: tensors[name].int()}))
    assert_same_state(folder)
    tensors[name][3, 1] = 8
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tid2eid names experts 0 to 8 of 8"):
        DeepseekV4ForCausalLM.from_pretrained(folder)


def test_weights_are_read_as_the_dtype_asked_for() -> None:
    model = DeepseekV4ForCausalLM.from_pretrained(D1, dtype=torch.bfloat16)
    stored = load_file(D1 / "model.safetensors")
    assert torch.equal(model.get_parameter("mtp.layers.0.h_proj.weight"), stored["mtp.0.h_proj.weight"].bfloat16())
    assert torch.equal(model.get_parameter("mtp.layers.0.attn_hc.fn"), stored["mtp.0.hc_attn_fn"])
    assert not model.training


def to_fp4(values: Tensor) -> Tensor:
    """[o, i] of FP4 values -> bytes [o, i / 2], the even column in the low half."""
    codes = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}
    flat = [codes[abs(v)] + 8 * (v < 0) for v in values.flatten().tolist()]
    pairs = torch.tensor(flat, dtype=torch.uint8).view(values.shape[0], -1, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).view(torch.int8)


@pytest.mark.parametrize("suffix", ["scale", "weight_scale_inv"])
def test_quantised_releases_are_decoded(folder: Path, suffix: str) -> None:
    draw = torch.Generator().manual_seed(4)
    eighths = torch.randint(-8, 9, (32, 32), generator=draw) / 8.0
    sevenths = torch.tensor([0.5, -1.5, 6.0, -3.0]).repeat(32, 8)
    power = torch.full((32, 1), 0.25).to(torch.float8_e8m0fnu)

    def quantise(tensors: Tensors) -> None:
        tensors["mtp.0.e_proj.weight"] = eighths.to(torch.float8_e4m3fn)
        tensors[f"mtp.0.e_proj.{suffix}"] = torch.tensor([[0.5]])
        tensors["mtp.0.ffn.experts.2.w3.weight"] = to_fp4(sevenths)
        tensors["mtp.0.ffn.experts.2.w3.scale"] = power

    rewrite(folder, quantise)
    model = DeepseekV4ForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_parameter("mtp.layers.0.e_proj.weight"), eighths * 0.5)
    assert torch.equal(model.get_parameter("mtp.layers.0.mlp.experts.gate_up_proj")[2, 32:], sevenths * 0.25)


def test_wrong_scales_are_refused(folder: Path) -> None:
    def quantise(tensors: Tensors) -> None:
        for name in ("mtp.0.e_proj", "mtp.0.h_proj"):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors["mtp.0.h_proj.scale"] = torch.ones(1, 2)
        tensors["mtp.0.ffn.experts.2.w3.weight"] = torch.zeros(32, 32, dtype=torch.int8)
        tensors["mtp.0.ffn.experts.2.w3.scale"] = torch.ones(32, 1)

    rewrite(folder, quantise)
    with pytest.raises(ValueError) as caught:
        DeepseekV4ForCausalLM.from_pretrained(folder)
    for problem in (
        "mtp.0.e_proj.weight is F8_E4M3 but has no scales beside it",
        "mtp.0.h_proj.scale has shape (1, 2), expected (1, 1)",
        "mtp.0.ffn.experts.2.w3.weight has shape (32, 32), expected (32, 16)",
    ):
        assert problem in str(caught.value)
