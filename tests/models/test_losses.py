"""Losses per token: values and gradients against torch, what counts, configs, and everything they refuse."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _loss_kit import IGNORED, MAKERS, H, Loss, T, V, every_loss, inputs, run
from torch import Tensor, nn

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy
from mtp_convert.models.losses import (
    LOSS_CONFIG_REGISTRY,
    ChunkedCEConfig,
    ChunkedCrossEntropy,
    FusedLinearCEConfig,
    MaskedCrossEntropy,
    MaskedCrossEntropyConfig,
    build_loss_module,
    calculate_loss,
    get_lm_head,
    get_lm_head_weight,
)


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_values_and_gradients(make: Callable[[str], Loss], reduction: str) -> None:
    hidden, weight, labels = inputs()
    found = run(make(reduction), hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    factors = torch.arange(1.0, 1.0 + expected.numel(), dtype=torch.float64).view(expected.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight), factors),
        torch.autograd.grad(expected, (hidden, weight), factors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# --- what counts


@every_loss
def test_number_of_label_tokens_divides_the_sum(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    loss = make("sum")
    total = run(loss, hidden, weight, labels)
    torch.testing.assert_close(run(loss, hidden, weight, labels, num_label_tokens=8), total / 8)
    nothing = run(loss, hidden, weight, labels, num_label_tokens=0)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, hidden)[0].count_nonzero() == 0


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_label_gives_zero_and_zero_gradients(make: Callable[[str], Loss], reduction: str) -> None:
    hidden, weight, labels = inputs()
    loss = run(make(reduction), hidden, weight, torch.full_like(labels, IGNORED))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.count_nonzero() == 0


@every_loss
def test_no_token_gives_zero(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    assert run(make("sum"), hidden[:0], weight, labels[:0]).item() == 0


@every_loss
def test_loss_weights_scale_tokens(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    factors = torch.linspace(0, 2, T)
    each = run(make("none"), hidden, weight, labels)
    found = run(make("sum"), hidden, weight, labels, loss_weights=factors, num_label_tokens=3)
    torch.testing.assert_close(found, (each * factors).sum() / 3)


@pytest.mark.parametrize("name", ["masked", "chunked"])
def test_mask_leaves_tokens_out_and_labels_alone(name: str) -> None:
    hidden, weight, labels = inputs()
    mask, before = torch.arange(T) % 2, labels.clone()
    found = run(MAKERS[name]("sum"), hidden, weight, labels, mask=mask)
    expected = run(MAKERS[name]("none"), hidden, weight, labels)
    torch.testing.assert_close(found, expected[1::2].sum())
    assert torch.equal(labels, before)


@pytest.mark.parametrize("name", ["chunked", "fused"])
def test_infinite_ignored_rows_do_not_spread(name: str) -> None:
    hidden, weight, labels = inputs()
    broken = hidden.detach().clone()
    broken[0] = math.inf
    broken.requires_grad_()
    loss = run(MAKERS[name]("sum"), broken, weight, labels)
    assert loss.isfinite()
    if name == "chunked":  # the head's gradient sums products with the hidden states themselves, 0 * inf
        logits = (broken @ weight.T).detach().requires_grad_()
        ChunkedCrossEntropy(4, IGNORED)(logits, labels).backward()
        assert logits.grad is not None
        assert logits.grad[0].count_nonzero() == 0


@every_loss
def test_rows_and_int32_labels(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    rows = run(make("none"), hidden[:16].view(2, 8, H), weight, labels[:16].view(2, 8).int())
    torch.testing.assert_close(rows, run(make("none"), hidden[:16], weight, labels[:16]).view(2, 8))


# --- what is refused


@pytest.mark.parametrize("build", [MaskedCrossEntropy, ChunkedCrossEntropy, FusedLinearCrossEntropy])
def test_constructors_refuse(build: type[Loss]) -> None:
    with pytest.raises(ValueError, match="reduction is 'max', expected one of"):
        build(reduction="max")
    if build is not MaskedCrossEntropy:
        with pytest.raises(ValueError, match="chunk_len is 0, expected 1 or more"):
            build(chunk_len=0)  # type: ignore[call-arg]


@every_loss
@pytest.mark.parametrize("extra", [{"num_label_tokens": 3}, {"loss_weights": torch.ones(T)}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sum_only_arguments(make: Callable[[str], Loss], extra: dict[str, Any], reduction: str) -> None:
    with pytest.raises(ValueError, match=f"only supported with reduction 'sum', got '{reduction}'"):
        run(make(reduction), *inputs(), **extra)


@every_loss
def test_shapes_are_checked(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"\(16,\).* do not fit"):
        run(make("sum"), hidden, weight, labels[:16])
    with pytest.raises(ValueError, match=r"loss_weights has shape \(16,\), expected \(17,\)"):
        run(make("sum"), hidden, weight, labels, loss_weights=torch.ones(16))


def test_shapes_of_mask_and_head_are_checked() -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"mask \(1, 17\) do not fit"):
        run(MaskedCrossEntropy(), hidden, weight, labels, mask=torch.ones(1, T))
    with pytest.raises(ValueError, match=r"lm_weight \(23, 6\) do not fit"):
        FusedLinearCrossEntropy()(hidden, labels, weight[:, 1:])


# --- calculate_loss


class Model(nn.Module):
    """Has its LM head deep inside, and says so only if asked to."""

    def __init__(self, weight: Tensor, *, says: bool = False) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"lm_head": nn.Linear(H, V, bias=False, dtype=weight.dtype)})
        self.language_model["lm_head"].weight = nn.Parameter(weight.detach().clone())
        if says:
            other = nn.Linear(H, V)
            self.get_output_embeddings = lambda: other


def test_lm_head_is_found() -> None:
    model, talking = Model(torch.zeros(V, H)), Model(torch.zeros(V, H), says=True)
    assert get_lm_head(model) is model.language_model["lm_head"]
    assert get_lm_head(talking) is talking.get_output_embeddings()
    assert get_lm_head(nn.Linear(1, 1)) is None
    assert get_lm_head_weight(model) is model.language_model["lm_head"].weight
    with pytest.raises(ValueError, match=r"lm_head\.weight not found in model"):
        get_lm_head_weight(nn.Linear(1, 1))


def test_both_kinds_of_loss_agree() -> None:
    hidden, weight, labels = inputs()
    labels = labels.masked_fill(labels == IGNORED, -100)  # what datasets write, not what these losses call it
    logits = hidden @ weight.T
    masked = calculate_loss(MAKERS["masked"]("sum"), labels=labels, logits=logits, num_label_tokens=3)
    model = Model(weight)
    fused = calculate_loss(MAKERS["fused"]("sum"), labels=labels, hidden_states=hidden, model=model, num_label_tokens=3)
    given = calculate_loss(
        MAKERS["fused"]("sum"), labels=labels, hidden_states=hidden, lm_weight=weight, num_label_tokens=3
    )
    expected = F.cross_entropy(logits, labels, reduction="sum") / 3
    for found in (masked, fused, given):
        torch.testing.assert_close(found, expected)


def test_other_losses_get_logits_and_labels() -> None:
    class Weighted(nn.Module):
        def forward(
            self, logits: Tensor, labels: Tensor, num_label_tokens: int | None, loss_weights: Tensor | None = None
        ) -> Tensor:
            return logits.sum() + labels.sum() + (num_label_tokens or 0) + (0 if loss_weights is None else 1000)

    plain = calculate_loss(Weighted(), labels=torch.ones(2), logits=torch.ones(2, 3), num_label_tokens=100)
    assert plain.item() == 108
    weighted = calculate_loss(Weighted(), labels=torch.ones(2), logits=torch.ones(2, 3), loss_weights=torch.ones(2))
    assert weighted.item() == 1008


def test_calculate_loss_names_what_is_missing() -> None:
    hidden, _, labels = inputs()
    with pytest.raises(ValueError, match="MaskedCrossEntropy needs logits"):
        calculate_loss(MaskedCrossEntropy(), labels=labels, hidden_states=hidden)
    with pytest.raises(ValueError, match="FusedLinearCrossEntropy needs hidden_states"):
        calculate_loss(FusedLinearCrossEntropy(), labels=labels, logits=hidden)
    with pytest.raises(ValueError, match="FusedLinearCrossEntropy needs lm_weight"):
        calculate_loss(FusedLinearCrossEntropy(), labels=labels, hidden_states=hidden)


# --- configs


def test_configs_build_their_losses() -> None:
    masked = MaskedCrossEntropyConfig(fp32_upcast=False, ignore_index=1, reduction="mean").build()
    assert (masked.fp32_upcast, masked.ignore_index, masked.reduction) == (False, 1, "mean")
    chunked = ChunkedCEConfig(chunk_len=3, ignore_index=1, reduction="none").build()
    assert (chunked.chunk_len, chunked.ignore_index, chunked.reduction) == (3, 1, "none")
    fused = FusedLinearCEConfig(ignore_index=1, logit_softcapping=2.0, reduction="mean", chunk_len=3).build()
    assert (fused.ignore_index, fused.logit_softcapping, fused.reduction, fused.chunk_len) == (1, 2.0, "mean", 3)
    with pytest.raises(FrozenInstanceError):
        MaskedCrossEntropyConfig().reduction = "mean"  # type: ignore[misc]


@pytest.mark.parametrize("name", LOSS_CONFIG_REGISTRY)
def test_names_build_the_loss_they_name(name: str) -> None:
    loss = build_loss_module(name, ignore_index=4)
    assert type(loss).__name__ == name
    assert loss.ignore_index == 4


def test_build_loss_module() -> None:
    assert isinstance(build_loss_module(ChunkedCEConfig()), ChunkedCrossEntropy)
    assert build_loss_module(MaskedCrossEntropy, reduction="mean").reduction == "mean"
    with pytest.raises(TypeError, match=r"not the class ChunkedCEConfig; write ChunkedCEConfig\(\)"):
        build_loss_module(ChunkedCEConfig)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_len must be set on the config"):
        build_loss_module(ChunkedCEConfig(), chunk_len=3)
    with pytest.raises(TypeError, match="Unknown loss name 'Nothing', expected one of"):
        build_loss_module("Nothing")
    with pytest.raises(TypeError, match="expected a config, a name or a class/callable, got int"):
        build_loss_module(3)  # type: ignore[arg-type]
