"""Main loss and MTP loss at the end of a pipeline: which output means what, and which factor counts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _loss_kit import Model
from torch import Tensor

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy, LinearCrossEntropy
from mtp_convert.models.losses import MaskedCrossEntropy
from mtp_convert.models.mtp import MTPConfig
from mtp_convert.models.mtp_loss import MTPLossConfig, PipelineCausalLMLoss, calculate_mtp_loss

B, S, H, V, D = 2, 6, 4, 11, 2


@pytest.fixture
def model() -> Model:
    return Model(torch.randn(V, H), MTPConfig(D, "*", loss_scaling_factor=0.5))


@pytest.fixture
def per_depth() -> list[Tensor]:
    return [torch.randn(B, S, H) for _ in range(D)]


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(B, S, V)


def mtp_part(model: Model, per_depth: list[Tensor], labels: Tensor, factor: float, **kwargs: Any) -> Tensor:  # noqa: ANN401
    arguments: dict[str, Any] = {"mtp_per_depth_h": per_depth, "labels": labels, "model": model, **kwargs}
    return calculate_mtp_loss(MaskedCrossEntropy(), scaling_factor=factor, **arguments)


def test_config_builds_the_pipeline_loss(model: Model) -> None:
    loss_fn, group = MaskedCrossEntropy(), object()
    loss = MTPLossConfig(scaling_factor=0.3, ignore_index=-100).build(loss_fn, model, grad_reduce_group=group)  # type: ignore[arg-type]
    assert isinstance(loss, PipelineCausalLMLoss)
    assert (loss.loss_fn, loss.model, loss.scaling_factor, loss.ignore_index) == (loss_fn, model, 0.3, -100)
    assert loss.grad_reduce_group is group
    assert loss.cu_seqlens is None
    assert list(loss.parameters()) == []
    with pytest.raises(ValueError, match="ignore_index is 3, but MaskedCrossEntropy leaves out -100"):
        MTPLossConfig(ignore_index=3).build(loss_fn, model)


def test_factor_of_config_output_and_model(
    model: Model, per_depth: list[Tensor], labels: Tensor, logits: Tensor
) -> None:
    main = MaskedCrossEntropy()(logits, labels)
    own = MTPLossConfig(scaling_factor=0.7).build(MaskedCrossEntropy(), model)
    inherited = MTPLossConfig().build(MaskedCrossEntropy(), model)
    named = SimpleNamespace(logits=logits, mtp_per_depth_h=per_depth, mtp_loss_scaling_factor=0.2)
    unnamed = SimpleNamespace(logits=logits, mtp_per_depth_h=per_depth, mtp_loss_scaling_factor=None)
    for loss, output, factor in (
        (own, named, 0.7),
        (inherited, named, 0.2),
        (inherited, unnamed, 0.5),
        (inherited, (logits, *per_depth), 0.5),
    ):
        expected = main + mtp_part(model, per_depth, labels, factor)
        torch.testing.assert_close(loss(output, labels), expected)


def test_only_training_adds_the_mtp_loss(model: Model, per_depth: list[Tensor], labels: Tensor, logits: Tensor) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    model.eval()
    placeholders = [torch.full((B, S, H), torch.nan)] * D  # what a last stage returns to keep its arity
    assert torch.equal(loss((logits, *placeholders), labels), MaskedCrossEntropy()(logits, labels))
    model.train()
    loss.eval()  # the model's mode counts, not this module's
    assert loss((logits, *per_depth), labels) > MaskedCrossEntropy()(logits, labels)


def test_outputs_without_depths(model: Model, labels: Tensor, logits: Tensor) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    tail = torch.ones(B, S, dtype=torch.int32)
    for output in (logits, (logits,), (logits, tail), {"logits": logits, "mtp_per_depth_h": None}):
        assert torch.equal(loss(output, labels), MaskedCrossEntropy()(logits, labels))


def test_seq_idx_tail_is_known_by_its_dtype(
    model: Model, per_depth: list[Tensor], labels: Tensor, logits: Tensor
) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    main = MaskedCrossEntropy()(logits, labels)
    tail = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    masked = mtp_part(model, per_depth, labels, 0.5, seq_idx=tail)
    loss.cu_seqlens = torch.tensor([0, 1, 6])  # the tail goes before it
    torch.testing.assert_close(loss((logits, *per_depth, tail), labels), main + masked)
    assert not torch.isclose(masked, mtp_part(model, per_depth, labels, 0.5))
    with pytest.raises(ValueError, match="mtp_per_depth_h does not match"):
        loss((logits, *per_depth, tail.long()), labels)


def test_borders_set_by_the_caller(model: Model, per_depth: list[Tensor], labels: Tensor, logits: Tensor) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    loss.cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    masked = mtp_part(model, per_depth, labels, 0.5, cu_seqlens=loss.cu_seqlens)
    found = loss((logits, *per_depth), labels)
    torch.testing.assert_close(found, MaskedCrossEntropy()(logits, labels) + masked)


@pytest.mark.parametrize("as_tuple", [True, False])
def test_depths_with_heads_of_their_own(model: Model, labels: Tensor, logits: Tensor, as_tuple: bool) -> None:
    depths = [torch.randn(B, S, V) for _ in range(D)]
    if as_tuple:
        model.mtp_outputs_are_logits = True  # type: ignore[assignment]
    output = (logits, *depths) if as_tuple else SimpleNamespace(logits=logits, mtp_per_depth_logits=depths)
    part = calculate_mtp_loss(
        MaskedCrossEntropy(), mtp_per_depth_logits=depths, labels=labels, model=model, scaling_factor=0.5
    )
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    torch.testing.assert_close(loss(output, labels), MaskedCrossEntropy()(logits, labels) + part)


def test_loss_from_hidden_states(model: Model, per_depth: list[Tensor], labels: Tensor) -> None:
    hidden = torch.randn(B, S, H)
    logits = model.lm_head(hidden)
    main = MaskedCrossEntropy()(logits, labels)
    loss = MTPLossConfig().build(FusedLinearCrossEntropy(), model)
    assert isinstance(loss.loss_fn, LinearCrossEntropy)
    torch.testing.assert_close(loss(hidden, labels), main)
    both = main + mtp_part(model, per_depth, labels, 0.5)
    for states in (hidden, (None, torch.zeros(1), hidden), [hidden, None]):
        output = SimpleNamespace(logits=logits[..., :0], hidden_states=states, mtp_per_depth_h=per_depth)
        torch.testing.assert_close(loss(output, labels), both)
    with pytest.raises(ValueError, match="FusedLinearCrossEntropy is not supported with MTP in a pipeline"):
        loss((logits, *per_depth), labels)
    with pytest.raises(ValueError, match="FusedLinearCrossEntropy needs hidden_states"):
        loss(SimpleNamespace(logits=logits, hidden_states=(None,)), labels)


def test_outputs_that_hold_nothing(model: Model, labels: Tensor) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), model)
    with pytest.raises(ValueError, match="empty tuple, expected logits first"):
        loss((), labels)
    with pytest.raises(ValueError, match="empty tuple, expected logits first"):
        loss((torch.ones(B, S, dtype=torch.int32),), labels)
    with pytest.raises(ValueError, match="MaskedCrossEntropy needs logits"):
        loss({}, labels)
