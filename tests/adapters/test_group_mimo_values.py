"""MiMo, MiMo-V2, Step, ERNIE and Inkling: which number goes where, written out; what cannot be said is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _kit import Config, Tensors, convert, differing, hf_folder
from _mimo_tiny import folder, layout, random, tiny
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError


def megatron_and_source(name: str, scratch: Path, config: Config | None = None) -> tuple[Tensors, Tensors]:
    """A checkpoint in Megatron's names, as tensors, and what it was made of."""
    source = folder(scratch / "source", config or tiny(name))
    convert(source, scratch / "there", "megatron", container="legacy", parallel={"tensor": 1})
    (rank,) = (scratch / "there").rglob("mp_rank_00/*.pt")
    held: Tensors = torch.load(rank, weights_only=False)["model"]
    return {n: t for n, t in held.items() if isinstance(t, Tensor)}, load_file(source / "model.safetensors")


def groups(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """[q; k; v] per group."""
    runs = zip(q.chunk(count), k.chunk(count), v.chunk(count), strict=True)
    return torch.cat([x for run in runs for x in run])


def test_mimo_swaps_the_halves_of_its_projection(tmp_path: Path) -> None:
    there, source = megatron_and_source("mimo", tmp_path)
    hidden, embedding = source["model.mtp_layers.1.input_proj.weight"].chunk(2, dim=1)
    assert torch.equal(there["mtp.layers.1.eh_proj.weight"], torch.cat([embedding, hidden], dim=1))


@pytest.mark.parametrize("fused", [False, True])
def test_mimo_v2_windows_have_heads_of_their_own(fused: bool, tmp_path: Path) -> None:
    """Fused tensors have one run of rows per key/value head of full attention, also where a window has more of them."""
    config = tiny("mimo_v2_flash", attention_projection_layout="fused_qkv" if fused else None)
    there, source = megatron_and_source("mimo_v2_flash", tmp_path, config)
    at = "model.layers.1.self_attn."
    if fused:
        runs = [run.split([24, 24, 16]) for run in source[at + "qkv_proj.weight"].chunk(2)]
        q, k, v = (torch.cat(parts) for parts in zip(*runs, strict=True))
    else:
        q, k, v = (source[f"{at}{p}_proj.weight"] for p in "qkv")
    assert torch.equal(there["decoder.layers.1.self_attention.linear_qkv.weight"], groups(q, k, v, 4))
    sink = there["decoder.layers.1.self_attention.core_attention.softmax_offset"]
    assert torch.equal(sink, source[at + "attention_sink_bias"])


def test_mimo_v2_is_written_with_apart_projections_on_request(tmp_path: Path) -> None:
    config = tiny("mimo_v2_flash", attention_projection_layout="fused_qkv")
    convert(folder(tmp_path / "source", config), tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf", variant="split-qkv")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == layout(config, qkv="split").bindings.keys()


def test_mimo_v2_counts_depths_only_where_its_config_does(tmp_path: Path) -> None:
    silent = tiny("mimo_v2_flash", num_nextn_predict_layers=None)
    source = folder(tmp_path / "source", silent, depths=3)
    assert open_checkpoint(source).dims.depths == 3
    convert(source, tmp_path / "there", "megatron")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert differing(source, tmp_path / "back") == []


def test_step_appends_gates_on_every_rank(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny("step3p5"))
    convert(source, tmp_path / "there", "megatron", container="legacy", parallel={"tensor": 2})
    tensors, at = load_file(source / "model.safetensors"), "model.layers.1.self_attn."
    q, k, v, g = (tensors[f"{at}{p}_proj.weight"].chunk(2) for p in "qkvg")
    for rank in (0, 1):
        (file,) = (tmp_path / "there").rglob(f"mp_rank_0{rank}/*.pt")
        held = torch.load(file, weights_only=False)["model"]["decoder.layers.1.self_attention.linear_qkv.weight"]
        assert torch.equal(held, torch.cat([groups(q[rank], k[rank], v[rank], 1), g[rank]]))


def test_step_heads_that_megatron_never_had_are_the_models(tmp_path: Path) -> None:
    """Megatron-Core trains one head; what it saves becomes a release with that head at every depth."""
    source = folder(tmp_path / "source", tiny("step3p5"), heads="shared")
    convert(source, tmp_path / "there", "megatron", words={"heads": "shared"})
    (tmp_path / "there" / "mtp_convert.json").unlink()
    assert open_checkpoint(tmp_path / "there").layout.words["heads"] == "shared"
    convert(tmp_path / "there", tmp_path / "back", "hf", restore_shards=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for n in (4, 5):
        assert torch.equal(back[f"model.layers.{n}.transformer.shared_head.output.weight"], back["lm_head.weight"])


def test_step_heads_that_differ_cannot_be_shared(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", tiny("step3p5"))
    with pytest.raises(ConvertError, match=r"shared_head\.output\.weight is not lm_head\.weight: ") as caught:
        convert(source, tmp_path / "there", "megatron", variant="shared-heads")
    assert caught.value.code == "MTP028"
    assert not (tmp_path / "there").exists()


def test_ernie_has_the_models_norm_behind_an_mtp_layer(tmp_path: Path) -> None:
    there, source = megatron_and_source("ernie4_5_moe", tmp_path)
    assert torch.equal(there["mtp.layers.0.final_layernorm.weight"], source["model.norm.weight"])
    bias = source["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert bias.shape == (1, 4)
    assert torch.equal(there["decoder.layers.1.mlp.router.expert_bias"], bias[0])


def test_an_ernie_norm_that_was_trained_apart_is_refused(tmp_path: Path) -> None:
    config = tiny("ernie4_5_moe")
    native = random(layout(config, "native"))
    source = hf_folder(tmp_path / "source", native, config)
    with pytest.raises(ConvertError, match=r"final_layernorm\.weight is not model\.norm\.weight: ") as caught:
        convert(source, tmp_path / "back", "hf")
    assert caught.value.code == "MTP028"


def test_inkling_rows_of_gate_and_up_alternate(tmp_path: Path) -> None:
    config = tiny("inkling")
    source = folder(tmp_path / "source", config)
    convert(source, tmp_path / "native", "native")
    tensors, native = load_file(source / "model.safetensors"), load_file(tmp_path / "native" / "model.safetensors")
    fused = tensors["model.llm.layers.1.mlp.experts.w13_weight"]
    assert torch.equal(
        native["model.layers.1.mlp.experts.gate_up_proj"], torch.cat([fused[:, 0::2], fused[:, 1::2]], 1)
    )
    shared = tensors["model.llm.layers.1.mlp.shared_experts.shared_w13_weight"]
    assert torch.equal(native["model.layers.1.mlp.shared_experts.up_proj"], shared[:, 1::2])
    dense = tensors["model.mtp.layers.0.transformer_block.mlp.w13_dn.weight"]
    assert torch.equal(native["mtp.layers.0.mlp.gate_proj.weight"], dense[0::2])
    hidden, embedding = tensors["model.mtp.layers.0.input_proj.weight"].chunk(2, dim=1)
    assert torch.equal(native["mtp.layers.0.eh_proj.weight"], torch.cat([embedding, hidden], dim=1))
