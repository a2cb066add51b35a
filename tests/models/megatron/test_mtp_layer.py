"""MTP layers and blocks by themselves: names, shapes, gradients, recomputation, and the loss in training."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from _golden import EXPERTS, build, ids, settle, tiny
from torch import Tensor
from torch.nn import functional as F

from mtp_convert.models.megatron import multi_token_prediction as mtp
from mtp_convert.models.megatron.backends import LocalSpecProvider, TESpecProvider
from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.layer_specs import get_gpt_layer_spec
from mtp_convert.models.megatron.linear import ColumnParallelLinear, TEColumnParallelLinear
from mtp_convert.models.megatron.spec import ModuleSpec
from mtp_convert.models.megatron.transformer_layer import TransformerLayer

LAYER = "input_ids position_ids hidden_states attention_mask context context_mask rotary_pos_emb rotary_pos_cos"
LAYER += " rotary_pos_sin attention_bias inference_params packed_seq_params sequence_len_offset"
INNER = LAYER.removeprefix("input_ids position_ids ").replace("hidden_states", "hidden_states decoder_input")
SHARDED = "prefix sharded_offsets metadata"
TIE = "tp_group dp_cp_group"
# Megatron-Core's documented names, with the arguments that each must take, in order
API = {
    "tie_word_embeddings_state_dict": f"sharded_state_dict word_emb_weight word_emb_weight_key {TIE}",
    "tie_output_layer_state_dict": f"sharded_state_dict output_layer_weight output_layer_weight_key {TIE}",
    "roll_tensor": "tensor shifts dims cp_group packed_seq_params",
    "_roll_tensor_packed_seq": "tensor shifts dims packed_seq_params cp_group",
    "MTPLossLoggingHelper.save_loss_to_tracker": "loss layer_number num_layers reduce_group avg_group",
    "MTPLossLoggingHelper.clean_loss_in_tracker": "",
    "MTPLossLoggingHelper.reduce_loss_in_tracker": "",
    "get_mtp_layer_spec": "transformer_layer_spec use_transformer_engine",
    "get_mtp_layer_spec_for_backend": "transformer_layer_spec backend",
    "get_mtp_layer_offset": "config",
    "get_mtp_num_layers_to_build": "config vp_stage pp_rank",
    "MTPLossAutoScaler.forward": "ctx output mtp_loss",
    "MTPLossAutoScaler.backward": "ctx grad_output",
    "MTPLossAutoScaler.set_loss_scale": "scale",
    "MultiTokenPredictionLayerSubmodules": "enorm hnorm eh_proj transformer_layer layer_norm",
    "MultiTokenPredictionLayer": "config submodules layer_number vp_stage pg_collection",
    "MultiTokenPredictionLayer._get_embeddings": (
        "self input_ids position_ids embedding hidden_states packed_seq_params"
    ),
    "MultiTokenPredictionLayer._concat_embeddings": "self hidden_states decoder_input",
    "MultiTokenPredictionLayer._proj_and_transformer_layer": f"self {INNER}",
    "MultiTokenPredictionLayer._postprocess": "self hidden_states",
    "MultiTokenPredictionLayer._checkpointed_forward": "self forward_func args kwargs",
    "MultiTokenPredictionLayer.forward": f"self {LAYER} embedding",
    "MultiTokenPredictionLayer.sharded_state_dict": f"self {SHARDED}",
    "MultiTokenPredictionBlockSubmodules": "layer_specs",
    "_get_mtp_block_submodules": "config spec",
    "MultiTokenPredictionBlock": "config spec vp_stage pg_collection",
    "MultiTokenPredictionBlock._build_layers": "self pg_collection",
    "MultiTokenPredictionBlock.forward": f"self {LAYER} extra_block_kwargs embedding",
    "MultiTokenPredictionBlock.sharded_state_dict": f"self {SHARDED}",
}


@pytest.mark.parametrize("name", API)
def test_documented_names_take_documented_arguments(name: str) -> None:
    found: Any = mtp
    for part in name.split("."):
        found = getattr(found, part)
    taken = list(inspect.signature(found).parameters)
    assert taken[: len(API[name].split())] == API[name].split()


def test_the_module_holds_those_names_and_no_others() -> None:
    documented = {name.split(".")[0] for name in API} | {"SUPPORTED_ATTN_MASK"}
    assert set(mtp.__all__) == documented


def mtp_layer(model: LanguageModel, depth: int = 0) -> mtp.MultiTokenPredictionLayer:
    layer = model.mtp.layers[depth]
    assert isinstance(layer, mtp.MultiTokenPredictionLayer)
    return layer


def run_block(model: LanguageModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    output: Tensor = model.mtp(tokens, None, hidden, None, embedding=model.embedding)
    return output


@pytest.fixture
def model() -> LanguageModel:
    return settle(build(tiny(position_embedding_type="none")))


def states(tokens: Tensor, *, grad: bool = False) -> Tensor:
    """Hidden states [S, B, H] for tokens [B, S]."""
    shape = (tokens.shape[1], tokens.shape[0], 16)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


# --- what a depth computes ------------------------------------------------------------------------


def test_a_depth_is_the_written_formula(model: LanguageModel) -> None:
    tokens, layer = ids(), mtp_layer(model)
    hidden = states(tokens)
    got, rolled, _ = layer(tokens, None, hidden, None, embedding=model.embedding)
    shifted = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
    assert torch.equal(rolled, shifted)
    embedded = model.embedding.word_embeddings.weight[shifted].transpose(0, 1)
    left, right = layer.eh_proj.weight.chunk(2, 1)
    fused = layer.enorm(embedded) @ left.T + layer.hnorm(hidden) @ right.T
    torch.testing.assert_close(got, layer.final_layernorm(layer.mtp_model_layer(fused)))


def test_hidden_states_of_all_depths_follow_one_another(model: LanguageModel) -> None:
    tokens = ids()
    hidden = states(tokens)
    output = run_block(model, hidden, tokens)
    assert output.shape == (3 * 8, 2, 16)
    parts = output.chunk(3)
    assert torch.equal(parts[0], hidden)
    second, _, _ = mtp_layer(model, 1)(
        torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1), None, parts[1], None, embedding=model.embedding
    )
    assert torch.equal(parts[2], second)


def test_positions_roll_with_the_tokens() -> None:
    model = settle(build(tiny(position_embedding_type="learned_absolute", max_position_embeddings=8)))
    tokens = ids()
    positions = torch.arange(8).expand(2, 8)
    _, _, rolled = mtp_layer(model)(tokens, positions, states(tokens), None, embedding=model.embedding)
    assert rolled[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]


def test_a_repeated_layer_gathers_the_gradients_of_all_depths() -> None:
    """One layer run three times has the summed gradients of three equal layers."""
    changes: dict[str, Any] = {"mtp_num_layers": 3, "position_embedding_type": "none", **EXPERTS}
    shared = settle(build(tiny(**changes, mtp_use_repeated_layer=True)))
    single = settle(build(tiny(**changes)))
    assert [len(m.mtp.layers) for m in (shared, single)] == [1, 3]
    for layer in single.mtp.layers:
        layer.load_state_dict(shared.mtp.layers[0].state_dict())
    single.embedding.load_state_dict(shared.embedding.state_dict())
    tokens = ids()
    weights = torch.linspace(1, 2, 4 * 8, dtype=torch.float64)[:, None, None]
    outputs = [run_block(m, states(tokens), tokens) for m in (shared, single)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * weights).square().sum().backward()
    for name, weight in shared.mtp.layers[0].named_parameters():
        depths = [dict(layer.named_parameters())[name].grad for layer in single.mtp.layers]
        expected = sum(g for g in depths if g is not None)
        assert sum(bool(g is not None and g.abs().max() > 1e-6) for g in depths) > 1, name
        torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-10)


# --- recomputation --------------------------------------------------------------------------------


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    tokens = ids()
    hidden = states(tokens, grad=True)
    run_block(model, hidden, tokens)[8:].square().sum().backward()
    assert hidden.grad is not None
    return {"hidden": hidden.grad} | {n: p.grad for n, p in model.mtp.named_parameters() if p.grad is not None}


def recomputing(method: str | None, layers: int | None) -> LanguageModel:
    return settle(
        build(tiny(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers, **EXPERTS))
    )


def test_recomputed_activations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(settle(build(tiny(**EXPERTS))))
    model = recomputing("uniform", 1)
    calls = []
    original = mtp.MultiTokenPredictionLayer._postprocess
    monkeypatch.setattr(
        mtp.MultiTokenPredictionLayer, "_postprocess", lambda self, x: calls.append(1) or original(self, x)
    )
    got = gradients(model)
    assert len(calls) == 4  # two depths, forward and again on the way back
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-10)


def test_blockwise_recomputation_is_said_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match="does nothing in MTP layers"):
        gradients(recomputing("block", 1))


@pytest.mark.parametrize(("method", "layers"), [("uniform", 2), (None, None)])
def test_other_recomputation_is_refused(method: str | None, layers: int | None) -> None:
    with pytest.raises(ValueError, match="recompute_method='uniform' and recompute_num_layers=1"):
        gradients(recomputing(method, layers))


# --- the loss in training -------------------------------------------------------------------------


def training_loss(model: LanguageModel, tokens: Tensor, labels: Tensor, *, factor: float) -> Tensor:
    """The mean main loss plus `factor` / D times the mean loss of every depth, written out."""
    hidden = model.hidden_states(tokens)
    logits, _ = model.output_layer(hidden, weight=model._output_weight())
    losses = []
    for depth, part in enumerate(logits.chunk(3)):
        seen = 8 - depth
        wanted = labels[:, depth:]
        flat = part[:seen].permute(1, 2, 0)
        losses.append(F.cross_entropy(flat, wanted, reduction="none").sum() / wanted.numel())
    return losses[0] + factor / 2 * (losses[1] + losses[2])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_adds_the_mtp_loss_on_the_way_back(tied: bool) -> None:
    config = tiny(share_embeddings_and_output_weights=tied, mtp_loss_scaling_factor=0.3)
    model, written = settle(build(config)).train(), settle(build(config)).train()
    tokens = ids(9)
    tokens, labels = tokens[:, :8], tokens[:, 1:]
    loss = model(tokens, labels=labels, loss_mask=torch.ones(labels.shape, dtype=torch.float64)).mean()
    expected = training_loss(written, tokens, labels, factor=0.3)
    assert not torch.isclose(loss, expected)  # the value is the main model's loss alone
    loss.backward()
    expected.backward()
    for (name, got), (_, want) in zip(model.named_parameters(), written.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_detached_heads_leave_the_main_model_alone() -> None:
    grads = {}
    for factor in (0.0, 1.0):
        model = settle(build(tiny(mtp_detach_heads=True, mtp_loss_scaling_factor=factor))).train()
        tokens = ids(9)
        model(tokens[:, :8], labels=tokens[:, 1:]).mean().backward()
        grads[factor] = {n: p.grad for n, p in model.named_parameters()}
    for name, without in grads[0.0].items():
        assert torch.equal(grads[1.0][name], without) is not name.startswith("mtp."), name


def test_without_labels_the_loss_is_made_from_the_input() -> None:
    model = settle(build(tiny())).train()
    model(ids()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.mtp.parameters())


def test_evaluation_spends_nothing_on_the_mtp_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settle(build(tiny()))
    calls = []
    original = model.output_layer.forward
    monkeypatch.setattr(model.output_layer, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    with torch.no_grad():
        model(ids())
    assert len(calls) == 1


# --- descriptions and refusals --------------------------------------------------------------------


@pytest.mark.parametrize(("fused", "linear"), [(True, TEColumnParallelLinear), (False, ColumnParallelLinear)])
def test_descriptions_follow_the_backend(fused: bool, linear: type) -> None:
    inner = get_gpt_layer_spec(tiny(), experts=False)
    spec = mtp.get_mtp_layer_spec(inner, fused)
    assert spec == mtp.get_mtp_layer_spec_for_backend(inner, TESpecProvider() if fused else LocalSpecProvider())
    assert spec.module is mtp.MultiTokenPredictionLayer
    assert spec.submodules.eh_proj is linear
    assert spec.submodules.transformer_layer is inner


def test_a_block_can_be_described_in_two_ways() -> None:
    submodules = mtp.MultiTokenPredictionBlockSubmodules([])
    spec = ModuleSpec(mtp.MultiTokenPredictionBlock, submodules=submodules)
    for given in (submodules, spec):
        assert mtp._get_mtp_block_submodules(tiny(), given) is submodules
    for wrong in (ModuleSpec(TransformerLayer), "block"):
        with pytest.raises(TypeError, match="an MTP block"):
            mtp._get_mtp_block_submodules(tiny(), wrong)  # type: ignore[arg-type]


def test_every_depth_needs_its_layer() -> None:
    layer = mtp.get_mtp_layer_spec(get_gpt_layer_spec(tiny(), experts=False), True)
    with pytest.raises(ValueError, match="1 MTP layers described, the model has 2"):
        mtp.MultiTokenPredictionBlock(tiny(), mtp.MultiTokenPredictionBlockSubmodules([layer]))


@pytest.mark.parametrize("name", ["context", "attention_bias", "inference_params"])
def test_arguments_that_mtp_cannot_use_are_refused(model: LanguageModel, name: str) -> None:
    tokens = ids()
    with pytest.raises(ValueError, match=f"take no {name}"):
        mtp_layer(model)(tokens, None, states(tokens), None, embedding=model.embedding, **{name: torch.zeros(1)})


def test_the_embedding_is_needed(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="embedding"):
        mtp_layer(model)(ids(), None, states(ids()), None)


@pytest.mark.parametrize(
    ("version", "name"), [((0, 12), "transformer_layer"), ((0, 16), "transformer_layer"), ((0, 17), "mtp_model_layer")]
)
def test_the_inner_layer_has_its_versions_name(version: tuple[int, int], name: str) -> None:
    model = GPTModel(tiny(megatron_version=version))
    inner = {n.split(".")[3] for n in model.state_dict() if n.startswith("mtp.") and "fc1" in n}
    stored = {e.key.split(".")[3] for n, e in model.sharded_state_dict().items() if n.startswith("mtp.") and "fc1" in n}
    assert inner == {name}
    assert stored == {"transformer_layer"}
