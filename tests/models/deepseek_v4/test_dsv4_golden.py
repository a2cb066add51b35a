"""The DeepSeek-V4 tree against what NeMo AutoModel and transformers compute from the same folders."""

from pathlib import Path

import pytest
import torch
from _dsv4 import D1, D2, PAD, TOLERANCE, golden, predictions, relative, run, training, without_ties
from transformers import DeepseekV4ForCausalLM as TransformersModel

from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM, MoEConfig
from mtp_convert.models.mtp import get_mtp_loss_scaling_factor


@pytest.mark.parametrize(("folder", "depths"), [(D1, 1), (D2, 2)], ids=["one depth", "two depths, own ratios"])
@pytest.mark.parametrize("moe_config", [MoEConfig(), MoEConfig.automodel()], ids=["transformers", "automodel"])
def test_outputs_equal_automodel(folder: Path, depths: int, moe_config: MoEConfig) -> None:
    expected = golden(folder)
    output = run(training(folder, moe_config=moe_config), expected["input_ids"], output_hidden_states=True)
    assert relative(output.logits, expected["logits"]) < TOLERANCE
    assert output.hidden_states is not None
    assert relative(output.hidden_states, expected["last_hidden"]) < TOLERANCE
    assert output.mtp_per_depth_h is not None
    assert len(output.mtp_per_depth_h) == depths
    for k, hidden in enumerate(output.mtp_per_depth_h):
        assert relative(hidden, expected[f"mtp_per_depth_h.{k}"]) < TOLERANCE


def test_valid_positions_of_a_padded_row_equal_automodel() -> None:
    expected = golden(PAD)
    valid = expected["attention_mask"].bool()
    output = run(training(PAD), expected["input_ids"], attention_mask=expected["attention_mask"])
    for ours, name in zip(predictions(output), ("logits", "mtp_per_depth_h.0"), strict=True):
        assert relative(ours[valid], expected[name][valid]) < TOLERANCE
        assert relative(ours[~valid], expected[name][~valid]) > 0.1  # transformers routes padding, AutoModel does not


def test_with_its_routing_padded_positions_equal_automodel_too() -> None:
    expected = golden(PAD)
    model = training(PAD, moe_config=MoEConfig.automodel())
    output = run(model, expected["input_ids"], attention_mask=expected["attention_mask"])
    for ours, name in zip(predictions(output), ("logits", "mtp_per_depth_h.0"), strict=True):
        assert relative(ours, expected[name]) < TOLERANCE


@pytest.mark.parametrize("folder", [D1, D2, PAD], ids=lambda folder: folder.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backbone_equals_transformers(folder: Path, dtype: torch.dtype) -> None:
    given = golden(folder)
    theirs = TransformersModel.from_pretrained(folder, dtype=dtype)
    ours = training(folder, dtype=dtype)
    mask = given.get("attention_mask")
    with torch.no_grad():
        expected = theirs(given["input_ids"], attention_mask=mask, use_cache=False).logits
    # Sums on a CPU depend on where in memory a tensor begins, so the last bits may differ.
    assert relative(run(ours, given["input_ids"], attention_mask=mask).logits, expected) < 32 * torch.finfo(dtype).eps
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert state.pop(name).dtype == tensor.dtype, name
    assert all(name.startswith("mtp.") for name in state)


def exchange(model: DeepseekV4ForCausalLM, first: str, second: str) -> None:
    state = model.state_dict()
    kept = state[first].clone()
    state[first].copy_(state[second])
    state[second].copy_(kept)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("e_proj.weight", "h_proj.weight"),
        ("enorm.weight", "hnorm.weight"),
        ("norm.weight", "input_layernorm.weight"),
        ("attn_hc.base", "ffn_hc.base"),
    ],
)
def test_an_exchange_of_mtp_weights_is_far_outside_the_tolerance(first: str, second: str) -> None:
    expected = golden(D2)
    model = training(D2)
    exchange(model, f"mtp.layers.0.{first}", f"mtp.layers.0.{second}")
    hidden = run(model, expected["input_ids"]).mtp_per_depth_h
    assert hidden is not None
    for k in range(2):  # depth 1 continues what depth 0 made
        assert relative(hidden[k], expected[f"mtp_per_depth_h.{k}"]) > 1e-2


def test_gradients_reach_everything_that_is_trained() -> None:
    model = training(D2)
    output = model(golden(D2)["input_ids"])
    sum(hidden.square().mean() for hidden in output.mtp_per_depth_h).backward()
    assert model.mtp is not None
    assert model.get_parameter("mtp.layers.0.e_proj.weight").grad.abs().max() > 0  # type: ignore[union-attr]
    # The indexer picks entries by rank, which has no gradient; the main head and norm are not on MTP's path.
    elsewhere = ("lm_head.", "model.norm.", "model.hc_head.")
    for name, parameter in model.named_parameters():
        expected = ".indexer." not in name and not name.startswith(elsewhere)
        assert (parameter.grad is not None) == expected, name


def test_mtp_runs_in_training_and_where_asked_to() -> None:
    ids = golden(D1)["input_ids"]
    model = training(D1, mtp_loss_scaling_factor=0.3).eval()
    quiet = run(model, ids)
    assert quiet.mtp_per_depth_h is None
    assert quiet.mtp_loss_scaling_factor == get_mtp_loss_scaling_factor(model) == 0.3
    model.compute_mtp_in_eval = True
    asked, trained = run(model, ids), run(model.train(), ids)
    for one, other in zip(predictions(asked), predictions(trained), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(quiet.logits, asked.logits)


def test_without_depths_there_is_no_mtp() -> None:
    ids = golden(D1)["input_ids"]
    model = training(D1, num_nextn_predict_layers=0)
    assert model.mtp is None
    assert not any(name.startswith("mtp.") for name in model.state_dict())
    output = run(model, ids)
    assert output.mtp_per_depth_h is output.mtp_loss_scaling_factor is None
    assert torch.equal(output.logits, run(training(D1), ids).logits)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 36])
def test_no_position_sees_what_comes_after_it(length: int) -> None:
    ids = golden(D2)["input_ids"]
    model = without_ties(training(D2))
    whole, part = run(model, ids), run(model, ids[:, :length])
    # The last k + 1 positions of depth k embed filled-in tokens; logits are "depth -1".
    for k, (one, other) in enumerate(zip(predictions(part), predictions(whole), strict=True)):
        seen = max(length - k, 0)
        torch.testing.assert_close(one[:, :seen], other[:, :seen], rtol=0, atol=5e-5)
