"""Gradients, recomputed activations, fresh values, types."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GROUPS,
    MAMBA,
    PACKED,
    REPEATED,
    TOLERANCE,
    config_of,
    fresh,
    golden,
    load,
    predictions,
    report,
    run,
    some_ids,
)
from torch import Tensor, nn

from mtp_convert.models.losses import MaskedCrossEntropy
from mtp_convert.models.mtp_loss import PipelineCausalLMLoss, calculate_mtp_loss
from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, NemotronV3Model, build_nemotron_v3_mtp
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block


def backward(model: NemotronHForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(ids, labels=ids)
    (output.loss + sum(h.square().mean() for h in output.mtp_per_depth_h)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_parameter() -> None:
    model = fresh(GROUPS).train()
    found = backward(model, some_ids(2, 17))
    lacking = {name for name, _ in model.named_parameters()} - found.keys()
    assert lacking == set()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_shared_depths_add_up_their_gradients() -> None:
    ids = some_ids(1, 9)
    model = load(REPEATED).train()
    name = "mtp.layers.0.eh_proj.weight"
    output = model(ids)
    parts = [
        torch.autograd.grad(h.square().mean(), model.get_parameter(name), retain_graph=True)[0]
        for h in output.mtp_per_depth_h
    ]
    together = backward(model, ids)[name]
    assert torch.allclose(together, parts[0] + parts[1], rtol=1e-4, atol=1e-6)
    assert all(part.count_nonzero() for part in parts)


@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_activations_give_the_same_gradients(packed: bool) -> None:
    model, ids = fresh(MAMBA).train(), some_ids(2, 11)
    options = {"seq_idx": torch.tensor([[0] * 5 + [1] * 6, [0] * 11])} if packed else {}
    runs: Counter[int] = Counter()
    for block in model.modules():
        if isinstance(block, NemotronV3Block):
            block.norm.register_forward_hook(lambda _, __, ___, index=block.layer_idx: runs.update([index]))

    def gradients() -> dict[str, Tensor]:
        runs.clear()
        model.zero_grad()
        output = model(ids, **options)
        (output.logits.square().mean() + sum(h.square().mean() for h in output.mtp_per_depth_h)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert set(runs.values()) == {1}
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # again: nothing changes
    found = gradients()
    assert set(runs.values()) == {2}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = model.state_dict().keys()
    model.gradient_checkpointing_disable()
    gradients()
    assert set(runs.values()) == {1}
    assert names == model.state_dict().keys()


def test_recomputing_does_not_touch_a_cache() -> None:
    model, ids = load(D1).train(), some_ids(1, 6)
    expected = run(model, ids).logits
    model.gradient_checkpointing_enable()
    cache = model.new_cache()
    model(ids[:, :4], past_key_values=cache).logits.sum().backward()
    assert cache.length == 4
    found = model(ids[:, 4:], past_key_values=cache).logits
    assert torch.allclose(found, expected[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", [D1, REPEATED, GROUPS, MAMBA, PACKED], ids=lambda folder: folder.name)
def test_losses_equal_automodel(folder: Path) -> None:
    given, expected = golden(folder), report(folder)
    packed = {"seq_idx": given["seq_idx"]} if "seq_idx" in given else {}
    model, labels = load(folder).train(), given["labels_pre_shifted"]
    output = run(model, given["input_ids"], **packed)
    loss = calculate_mtp_loss(
        MaskedCrossEntropy(),
        mtp_per_depth_h=output.mtp_per_depth_h,
        labels=labels,
        model=model,
        scaling_factor=output.mtp_loss_scaling_factor,
        **packed,
    )
    assert float(loss.detach()) == pytest.approx(expected["mtp_loss_sum_reduction"], rel=1e-5)
    total = PipelineCausalLMLoss(MaskedCrossEntropy(), model)
    assert output.mtp_per_depth_h is not None
    assert packed or float(total(output, labels).detach()) == pytest.approx(
        expected["pipeline_total_loss_tuple"], rel=1e-5
    )


# Fresh values


def big(**changes: object) -> NemotronHForCausalLM:
    """Large enough for statistics."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "vocab_size": 512, "mamba_num_heads": 32, "initializer_range": 0.02}
    return NemotronHForCausalLM(config_of(MAMBA, **sizes, **changes))


@pytest.mark.parametrize("times", [1, 3], ids=["once", "again and again"])
@pytest.mark.parametrize("rescale", [True, False])
def test_statistics_of_fresh_values(rescale: bool, times: int) -> None:
    model = big(rescale_prenorm_residual=rescale)
    for _ in range(times - 1):
        model.initialize_weights(dtype=torch.float32)
    outputs = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    for name, p in model.named_parameters():
        if p.dim() < 2 or "conv1d" in name:
            continue
        std = 0.02 / math.sqrt(6) if rescale and name.endswith(outputs) else 0.02
        assert float(p.detach().mean()) == pytest.approx(0.0, abs=6 * std / math.sqrt(p.numel())), name
        assert float(p.detach().std()) == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name


def test_fresh_scalars() -> None:
    model = big(time_step_min=0.002, time_step_max=0.2, time_step_floor=0.003)
    heads = torch.arange(1.0, 33.0)
    for name, tensor in model.state_dict().items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            assert torch.equal(tensor, heads.log())
        elif leaf == "dt_bias":
            steps = nn.functional.softplus(tensor.double())
            assert steps.min() > 0.003 * 0.999
            assert 0.05 < steps.max() < 0.2 * 1.001
            assert steps.log().std() > 0.7  # log-uniform: log(100) / sqrt(12) is 1.3, less the floor
        elif leaf == "D" or (tensor.dim() == 1 and "norm" in name):
            assert (tensor == 1).all(), name
        elif leaf == "e_score_correction_bias":
            assert (tensor == 0).all()


def test_initializing_again_draws_everything_anew() -> None:
    model = big()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.initialize_weights(dtype=torch.float32)
    constant = {n for n, p in before.items() if torch.equal(p, model.get_parameter(n))}
    assert all(n.endswith((".A_log", ".D")) or "norm" in n for n in constant)


def test_initializing_fills_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = NemotronHForCausalLM(config_of(D1))
    with pytest.raises(ValueError, match=r"parameters are on the meta device \(model\.embed_tokens\.weight"):
        model.initialize_weights()
    model.to_empty(device="cpu")
    model.initialize_weights(buffer_device=torch.device("cpu"))
    assert run(model, some_ids(1, 4)).logits.isfinite().all()
    assert model.dtype == torch.bfloat16


# Types


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.initialize_weights() or m],
)
def test_casts_spare_what_releases_keep_in_float32(cast: object) -> None:
    assert callable(cast)
    model = cast(NemotronHForCausalLM(config_of(MAMBA)))
    kept = {name.rsplit(".", 1)[-1] for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "e_score_correction_bias"} == set(model._keep_in_fp32_modules_strict)
    assert all(t.dtype == torch.float64 for t in model.double().state_dict().values())


def test_gradients_of_spared_parameters_keep_their_type() -> None:
    model = fresh(D1).train()
    backward(model, some_ids(1, 5))
    model.to(torch.bfloat16)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_the_type_of_a_fresh_model_is_the_configs_unless_given() -> None:
    assert NemotronHForCausalLM(config_of(D1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert NemotronHForCausalLM(config_of(D1, dtype=torch.bfloat16), dtype=torch.float32).dtype == torch.float32
    assert NemotronHForCausalLM.from_config(config_of(D1), dtype=torch.float16).dtype == torch.float16
    mtp = build_nemotron_v3_mtp(config_of(D1), load(D1).mtp_config, dtype=torch.bfloat16)
    assert mtp.layers[0].get_parameter("eh_proj.weight").dtype == torch.bfloat16


def test_a_bfloat16_model_trains() -> None:
    model = fresh(MAMBA, std=0.02).to(torch.bfloat16).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        ids = some_ids(2, 12)
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(p.isfinite().all() for p in predictions(run(model, some_ids(1, 5))))


def test_a_backbone_alone_initializes_itself() -> None:
    model = NemotronV3Model(config_of(D1))
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(7.0)
    model.initialize_weights()
    assert (model.get_parameter("norm.weight") == 1).all()
    assert TOLERANCE < float(model.get_parameter("embed_tokens.weight").detach().std()) < 0.03
