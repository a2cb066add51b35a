"""DeepSeek-V4 under Megatron-Core's names: its development branch's keys, another tool's numbers, transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _compressed import GOLDEN_DSV4, SMALL, Converted, small
from _golden import DATA, GOLDEN, build, flat, golden_rank, golden_tensors, ids, lines, relative, tiny
from _kit import config_of, convert
from torch import Tensor
from transformers import DeepseekV4Config

from mtp_convert.adapters.deepseek_v4 import FAMILY
from mtp_convert.models.megatron.compressed_keys import Windows
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ParallelSizes
from mtp_convert.models.megatron.loading import load_rank, load_tensors, tensors_from_ranks
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout
from mtp_convert.verify.forward import run_hf

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAMES = ["dsv4_d1", "dsv4_mtpratio4", "dsv4_pad"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    scratch = tmp_path_factory.mktemp("dsv4")
    return {name: Converted(name, scratch) for name in NAMES}


# --- names and loading ----------------------------------------------------------------------------


def test_names_and_entries_are_those_of_megatron_core() -> None:
    _, *expected = (DATA / "dev_dsv4.txt").read_text().splitlines()
    found = lines(build(TransformerConfig(**GOLDEN_DSV4)))
    assert sorted(found) == sorted(expected)
    # in the state dict's order, too; what only sharded checkpoints have comes behind
    stored = [line for line in expected if not line.startswith("ONLY-SHARDED")]
    assert found[: len(stored)] == stored


@pytest.mark.parametrize("form", ["torch_dist", "legacy"])
def test_the_golden_checkpoint_loads_by_name(form: str) -> None:
    model = build(TransformerConfig(**GOLDEN_DSV4))
    if form == "legacy":
        load_rank(model, golden_rank("dsv4_dev"))
    else:
        load_tensors(model, golden_tensors("dsv4_dev"))
    found, expected = tensors_from_ranks([model.sharded_state_dict()]), golden_tensors("dsv4_dev")
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict(change: str) -> None:
    tensors = dict(golden_tensors("dsv4_dev"))
    name = "decoder.layers.1.self_attention.core_attention.indexer.compressor.ape"
    if change == "missing":
        del tensors[name]
    else:
        name = name.replace("layers.1", "layers.2")
        tensors[name] = torch.zeros(4, 16)
    with pytest.raises(ValueError, match=f"{change} {name}"):
        load_tensors(build(TransformerConfig(**GOLDEN_DSV4)), tensors)


# --- numbers --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_automodel(name: str, converted: dict[str, Converted]) -> None:
    known = converted[name]
    found = known.pairs(known.model().predict(known.outputs["input_ids"]))
    errors = {n: relative(got, expected) for n, (got, expected) in found.items()}
    assert max(errors.values()) < 1e-5, errors


@torch.no_grad()
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_computes_what_the_cpu_computes(name: str, device: str, converted: dict[str, Converted]) -> None:
    """With all windows chosen: the golden indexers score several alike, and devices choose different ones of them."""
    known = converted[name]
    model, tokens = known.model(dsa_indexer_topk=99), known.outputs["input_ids"]
    expected = flat(model.predict(tokens))
    for what, got in flat(model.to(device).predict(tokens.to(device))).items():
        assert relative(got, expected[what]) < 1e-4, what


@torch.no_grad()
def test_the_golden_checkpoint_computes_what_its_hugging_face_form_computes(tmp_path: Path) -> None:
    """Backbone by transformers, MTP depth by the tree of Hugging Face's names; long enough for a window of 128."""
    source, tokens = GOLDEN / "dsv4_dev", ids(140, vocab=96)
    convert(source / "ckpt", tmp_path / "hf", "hf", hf_config=source / "config.json")
    expected = run_hf(tmp_path / "hf", tokens)
    model = build(TransformerConfig(**GOLDEN_DSV4))
    load_tensors(model, golden_tensors("dsv4_dev"))
    found = model.predict(tokens)
    assert relative(found.logits, expected.logits) < 1e-5
    assert [relative(a, b) < 1e-5 for a, b in zip(found.mtp_logits, expected.mtp_logits, strict=True)] == [True]


def halves(weight: Tensor) -> Tensor:
    return weight.roll(len(weight) // 2, 0)


MUTANTS = {
    "overlapping windows": ("decoder.layers.1.self_attention.core_attention.compressor.linear_wkv.weight", halves),
    "places in a window": ("decoder.layers.2.self_attention.core_attention.compressor.ape", halves),
    "keys of the indexer": ("decoder.layers.3.self_attention.core_attention.indexer.compressor.norm.weight", halves),
    "heads of the indexer": ("decoder.layers.3.self_attention.core_attention.indexer.linear_wq_b.weight", halves),
    "sinks": ("decoder.layers.0.self_attention.core_attention.attn_sink", halves),
    "output groups": ("decoder.layers.0.self_attention.linear_o_group_proj", halves),
    "table of token ids": ("decoder.layers.0.mlp.router.tid2eid", halves),
    "streams": ("decoder.layers.2.mlp_hyper_connection.bias", lambda bias: bias.roll(4)),
    "mix of the streams": ("decoder.hc_head_base", halves),
    "mix of a depth": ("mtp.layers.0.hc_head_fn", halves),
    "fusion": ("mtp.layers.0.h_proj.weight", Tensor.t),
}


@torch.no_grad()
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_tensor_is_noticed(mutant: str, converted: dict[str, Converted]) -> None:
    known, (key, change) = converted["dsv4_d1"], MUTANTS[mutant]
    model = known.model()
    load_tensors(model, known.tensors | {key: change(known.tensors[key])})
    found = known.pairs(model.predict(known.outputs["input_ids"]))
    assert max(relative(got, expected) for got, expected in found.values()) > 1e-2


def test_what_transformers_writes_gives_the_same_model() -> None:
    """transformers folds rotary settings, ratios and hash layers into fields of its own."""
    released = config_of(Path(__file__).parents[3] / "fixtures/golden/automodel/dsv4_mtpratio4")
    written = DeepseekV4Config(**released).to_dict()
    assert "compress_ratios" not in written
    configs = []
    for config in (released | {"compress_ratios": released["compress_ratios"][:4]}, written):
        args = FAMILY.megatron_args(config, 2, False)
        configs.append(TransformerConfig.from_megatron_args(args))
    assert configs[0] == configs[1]
    assert configs[0].rotary_scaling_factor == 4.0
    assert configs[0].qk_pos_emb_head_dim == 8


# --- windows, packed rows, stages -----------------------------------------------------------------


def test_windows_begin_with_their_sequence() -> None:
    positions, numbers = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    windows = Windows.cut(positions, numbers, 2)
    assert windows.token_WR.tolist() == [[0, 1], [2, 3], [5, 6]]
    assert windows.position_W.tolist() == [0, 2, 0]
    assert windows.visible_SW.int().tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 1],
    ]


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other() -> None:
    """Sequences that begin inside a window of the row, and one that is shorter than any window."""
    model, lengths = small(), [13, 2, 18]
    row = ids(sum(lengths), rows=1)
    ends = torch.tensor([0, 13, 15, 33], dtype=torch.int32)
    packed = model.predict(row, PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends))
    for part in range(3):
        where = slice(int(ends[part]), int(ends[part + 1]))
        alone = model.predict(row[:, where])
        torch.testing.assert_close(packed.logits[:, where], alone.logits, rtol=1e-9, atol=1e-9)
        for together, single in zip(packed.mtp_hidden, alone.mtp_hidden, strict=True):
            torch.testing.assert_close(together[:, where], single, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_token_sees_nothing_behind_it() -> None:
    model, tokens = small(), ids(21, rows=1)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 32
    one, other = model.predict(tokens), model.predict(changed)
    moved = (one.logits - other.logits).abs().amax((0, 2))
    assert moved[:12].max() < 1e-12
    assert moved[12:].min() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("layout", [None, "Et|tttmmL"])
def test_stages_pass_streams_on(layout: str | None) -> None:
    whole, sizes = small(), ParallelSizes(pp=2)
    stages = None if layout is None else PipelineParallelLayerLayout.from_str(layout, 2)
    config = tiny(**SMALL | {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": stages})
    first, last = (build(config, sizes.at(rank)) for rank in range(2))
    for part in (first, last):
        load_tensors(part, tensors_from_ranks([whole.sharded_state_dict()]))
    assert not any("hc_head" in name for name in first.state_dict())
    streams = first(ids(15))
    assert streams.shape == (15, 2, 4 * 16)
    last.set_input_tensor(streams)
    assert torch.equal(last.hidden_states(ids(15)), whole.hidden_states(ids(15)))
    assert torch.equal(last(ids(15)), whole(ids(15)))


def test_mtp_layers_need_the_last_decoder_layer() -> None:
    layout = PipelineParallelLayerLayout.from_str("Etttt|mm|L", 3)
    config = tiny(**SMALL | {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": layout})
    with pytest.raises(ValueError, match="streams of the last decoder layer"):
        build(config, ParallelSizes(pp=3).at(1))


# --- training and precision -----------------------------------------------------------------------


def gradients(model: torch.nn.Module, device: str = "cpu", length: int = 33) -> dict[str, Tensor | None]:
    """Of a training step on rows of `length` tokens, MTP loss included."""
    tokens = ids(length).to(device)
    model.train().to(device)(tokens, labels=tokens).sum().backward()
    return {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}


def test_gradients_reach_everything_that_is_no_choice() -> None:
    found = gradients(small())
    without = {name for name, grad in found.items() if grad is None}
    assert without == {name for name in found if ".indexer." in name}
    assert [name for name, grad in found.items() if grad is not None and not grad.any()] == []


def test_recomputed_depths_have_the_same_gradients() -> None:
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    expected = gradients(small())
    for name, grad in gradients(small(**again)).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_detached_heads_leave_the_backbone_alone() -> None:
    """Then the MTP loss adds nothing to the decoder's gradients; else to all but what comes behind the streams."""
    found, usual, without = (
        {n: g for n, g in gradients(small(**changes)).items() if g is not None}
        for changes in ({"mtp_detach_heads": True}, {}, {"mtp_loss_scaling_factor": 0.0})
    )
    name = "mtp.layers.0.h_proj.weight"
    assert torch.equal(without[name], torch.zeros_like(without[name]))
    assert found[name].any()
    decoder = [n for n in without if n.startswith("decoder.")]
    assert [n for n in decoder if not torch.allclose(found[n], without[n])] == []
    behind = [n for n in decoder if torch.equal(usual[n], without[n])]
    assert behind == [*(f"decoder.hc_head_{n}" for n in ("fn", "base", "scale")), "decoder.final_layernorm.weight"]


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name: str, device: str, converted: dict[str, Converted]) -> None:
    known = converted[name]
    model = known.model(params_dtype=torch.bfloat16).to(device)
    pairs = known.pairs(model.predict(known.outputs["input_ids"].to(device)))
    assert {got.dtype for got, _ in pairs.values()} == {torch.bfloat16}
    # the median: a near tie of a router or an indexer makes single tokens wholly different
    errors = {n: float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median()) for n, (a, b) in pairs.items()}
    assert max(errors.values()) < 0.06, errors


def test_bfloat16_models_keep_some_numbers_exact() -> None:
    state = build(tiny(**SMALL | {"params_dtype": torch.bfloat16})).state_dict()
    tensors = {name: t.dtype for name, t in state.items() if not name.endswith("_extra_state")}
    connections = {name for name in tensors if "_hyper_connection." in name}
    exact = {name for name, dtype in tensors.items() if dtype == torch.float32}
    assert connections < exact
    words = {"attn_sink", "ape", "expert_bias", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    assert {name.rsplit(".", 1)[-1] for name in exact - connections} == words
    assert set(tensors.values()) == {torch.float32, torch.bfloat16, torch.int32}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_gradients_on_a_device(device: str) -> None:
    expected = gradients(small())
    for name, grad in gradients(small(), device).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"csa_compress_ratios": (0, 4, 3, 4, 0)}, "csa_compress_ratios has 5 entries for 6 layers"),
        ({"csa_compress_ratios": (0, 1, -2, 4, 4, 0)}, r"holds \[1, -2\]"),
        ({"dsa_indexer_topk": 0}, "missing for layers of ratio 4: dsa_indexer_topk"),
        ({"o_groups": 3}, "4 heads of 16 do not divide among o_groups 3"),
        ({"q_lora_rank": None, "csa_window_size": 0}, "sizes missing: csa_window_size, q_lora_rank"),
        ({"multi_latent_attention": False}, "dsv4_hybrid needs multi_latent_attention"),
        ({"transformer_impl": "local"}, 'transformer_impl="transformer_engine"'),
        ({"actual_vocab_size": 0}, "moe_n_hash_layers needs actual_vocab_size"),
        ({"gated_linear_unit": False}, "activation_func_clamp_value needs gated_linear_unit"),
        ({"experimental_attention_variant": "dsv5"}, "experimental_attention_variant is 'dsv5'"),
        ({"hybrid_layer_pattern": "EEEE"}, "not supported in models with a layer pattern"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{**SMALL, **changes})


def test_one_layer_for_all_depths_needs_one_ratio() -> None:
    model = small(csa_compress_ratios=(0, 4, 3, 4, 0), mtp_use_repeated_layer=True)
    assert len(model.predict(ids(9)).mtp_hidden) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 5, 5, dtype=torch.bool)}, "takes no attention_mask"),
        ({"input_ids": None}, "chooses experts by token id"),
    ],
    ids=["mask", "ids"],
)
def test_inputs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    layer, streams = small().decoder.layers[0], torch.zeros(5, 2, 4 * 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        layer(streams, **{"input_ids": ids(5), **change})


def test_tensor_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="not cut over tensor ranks, got 2"):
        build(tiny(**SMALL), ParallelSizes(tp=2).at(0))
