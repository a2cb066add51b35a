"""The MTP loss: targets against a loop, values and gradients against plain torch, and everything it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _loss_kit import Model, plain_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy
from mtp_convert.models.losses import MaskedCrossEntropy
from mtp_convert.models.mtp import MTPConfig, prepare_mtp_context_parallel_inputs
from mtp_convert.models.mtp_loss import MTPLossConfig, MTPLossOutput, calculate_mtp_loss

B, S, H, V, D = 2, 6, 4, 11, 2


class Recorder(nn.Module):
    """A loss that remembers the labels it was given."""

    ignore_index = -100

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[list[Any]] = []

    def forward(self, logits: Tensor, labels: Tensor, **_: object) -> Tensor:
        self.labels.append(labels.tolist())
        return logits.sum() * 0.0


# --- targets


def targets(labels: Tensor, depths: int, **kwargs: Any) -> list[list[Any]]:  # noqa: ANN401
    loss = Recorder()
    logits = [torch.zeros(*labels.shape, 3)] * depths
    calculate_mtp_loss(loss, mtp_per_depth_logits=logits, labels=labels, model=nn.Identity(), **kwargs)
    return loss.labels


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.integers(0, 2), min_size=1, max_size=10), depths=st.integers(1, 4), flat=st.booleans())
def test_targets_against_a_loop(documents: list[int], depths: int, flat: bool) -> None:
    length = len(documents)
    labels, seq_idx = torch.arange(1, 1 + length), torch.tensor(documents)
    expected = [
        [t + k + 2 if t + k + 1 < length and documents[t] == documents[t + k + 1] else -100 for t in range(length)]
        for k in range(depths)
    ]
    if flat:
        assert targets(labels, depths, seq_idx=seq_idx) == expected
    else:
        found = targets(labels.expand(2, -1), depths, seq_idx=seq_idx.expand(2, -1))
        assert found == [[row, row] for row in expected]


ROW = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
TWO_DOCUMENTS = [[2, 3, 4, -100, 6, 7, 8, -100], [3, 4, -100, -100, 7, 8, -100, -100]]


@pytest.mark.parametrize(
    "borders",
    [
        {"cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([[0, 4, 8]])},
        {"cu_seqlens": torch.tensor([0, 4, 8, -1000, -1000, -1000])},
        {"cu_seqlens": torch.tensor([0, 4])},  # the rest is one more document
        {"seq_idx": torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])},
        {"seq_idx": torch.tensor([[7, 7, 7, 7, 3, 3, 3, 3]])},
        {"seq_idx": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), "cu_seqlens": torch.tensor([0, 2, 8])},
    ],
)
def test_borders_of_documents(borders: dict[str, Tensor]) -> None:
    assert targets(ROW, 2, **borders) == TWO_DOCUMENTS
    if borders.get("seq_idx", ROW).dim() == 1:
        assert targets(ROW.expand(3, -1), 2, **borders) == [[row] * 3 for row in TWO_DOCUMENTS]


def test_labels_of_the_caller_are_left_alone() -> None:
    labels = ROW.clone()
    targets(labels, 3)
    assert torch.equal(labels, ROW)


def test_prepared_targets_are_used_as_they_are() -> None:
    prepared = (torch.arange(8), torch.full((8,), -100))
    assert targets(ROW, 2, mtp_per_depth_targets=prepared) == [list(range(8)), [-100] * 8]


def test_prepared_targets_are_the_ones_made_here() -> None:
    labels, seq_idx = ROW.view(1, -1), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    prepared = prepare_mtp_context_parallel_inputs(
        {"input_ids": labels, "labels": labels, "seq_idx": seq_idx}, num_depths=2
    )
    assert [t.tolist() for t in prepared.targets] == targets(labels, 2, seq_idx=seq_idx)


# --- values and gradients


def batch(dtype: torch.dtype = torch.float64) -> tuple[Model, list[Tensor], Tensor]:
    torch.manual_seed(4)
    model = Model(torch.randn(V, H, dtype=dtype))
    return model, [torch.randn(B, S, H, dtype=dtype, requires_grad=True) for _ in range(D)], torch.randint(V, (B, S))


def reference(weight: Tensor, per_depth: list[Tensor], labels: Tensor, factor: float) -> Tensor:
    """The mean of the depths' losses, position by position."""
    total = torch.zeros((), dtype=weight.dtype)
    for k, hidden in enumerate(per_depth):
        logits = hidden[:, : S - k - 1] @ weight.T
        total = total + F.cross_entropy(logits.flatten(0, 1), labels[:, k + 1 :].flatten(), reduction="sum")
    return total * factor / len(per_depth)


@plain_losses
def test_gradients(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    inputs = (*per_depth, model.lm_head.weight)
    found = calculate_mtp_loss(loss, mtp_per_depth_h=per_depth, labels=labels, model=model, scaling_factor=0.3)
    expected = reference(model.lm_head.weight, per_depth, labels, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@plain_losses
def test_gradcheck(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    seq_idx = torch.tensor([0, 0, 0, 1, 1, 1])

    def total(*hidden: Tensor) -> Tensor:
        return calculate_mtp_loss(loss, mtp_per_depth_h=hidden, labels=labels, model=model, seq_idx=seq_idx)

    assert torch.autograd.gradcheck(total, per_depth)


@plain_losses
def test_parts_carry_their_graph(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    output = calculate_mtp_loss(
        loss, mtp_per_depth_h=per_depth, labels=labels, model=model, scaling_factor=0.5, return_per_depth=True
    )
    assert isinstance(output, MTPLossOutput)
    torch.testing.assert_close(output.loss, 0.25 * (output.per_depth_losses[0] + output.per_depth_losses[1]))
    for k, part in enumerate(output.per_depth_losses):
        grads = torch.autograd.grad(part, per_depth, retain_graph=True, allow_unused=True)
        assert [g is not None for g in grads] == [j == k for j in range(D)]


def test_no_factor_takes_the_model_s() -> None:
    model, per_depth, labels = batch()
    model.mtp_config = MTPConfig(D, "*", loss_scaling_factor=0.6)
    arguments: dict[str, Any] = {"mtp_per_depth_h": per_depth, "labels": labels, "model": model}
    found = calculate_mtp_loss(MaskedCrossEntropy(), scaling_factor=None, **arguments)
    torch.testing.assert_close(found, 6 * calculate_mtp_loss(MaskedCrossEntropy(), **arguments))


@plain_losses
def test_more_depths_than_positions_add_nothing(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    output = calculate_mtp_loss(
        loss,
        mtp_per_depth_h=[h[:, :2] for h in per_depth],
        labels=labels[:, :2],
        model=model,
        return_per_depth=True,
    )
    assert output.per_depth_losses[0].item() > 0
    assert output.per_depth_losses[1].item() == 0
    assert output.loss.isfinite()


@plain_losses
def test_flat_rows_lose_the_batch_dimension(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    rows = calculate_mtp_loss(
        loss, mtp_per_depth_h=[h[:1] for h in per_depth], labels=labels[:1], model=model, return_per_depth=True
    )
    flat = calculate_mtp_loss(
        loss, mtp_per_depth_h=[h[:1] for h in per_depth], labels=labels[0], model=model, return_per_depth=True
    )
    assert torch.equal(torch.stack(rows.per_depth_losses), torch.stack(flat.per_depth_losses))


@plain_losses
def test_loss_weights_move_with_the_labels(loss: nn.Module) -> None:
    model, per_depth, labels = batch()
    weights = torch.zeros(B, S)
    weights[1, 4] = 2.0
    found = calculate_mtp_loss(
        loss,
        mtp_per_depth_h=per_depth,
        labels=labels,
        model=model,
        loss_weights=weights,
        return_per_depth=True,
    )
    for k, part in enumerate(found.per_depth_losses):  # label 4 is the target of position 3 - k
        logits = per_depth[k][1, 3 - k] @ model.lm_head.weight.T
        torch.testing.assert_close(part, 2 * F.cross_entropy(logits, labels[1, 4]))


def test_lm_head_of_another_dtype() -> None:
    model, per_depth, labels = batch(torch.float32)
    narrow = [h.detach().bfloat16() for h in per_depth]
    for loss in (MaskedCrossEntropy(), FusedLinearCrossEntropy()):
        found = calculate_mtp_loss(loss, mtp_per_depth_h=narrow, labels=labels, model=model)
        expected = calculate_mtp_loss(loss, mtp_per_depth_h=[h.float() for h in narrow], labels=labels, model=model)
        assert torch.equal(found, expected)
    model.lm_head.bfloat16()
    assert calculate_mtp_loss(MaskedCrossEntropy(), mtp_per_depth_h=per_depth, labels=labels, model=model).isfinite()


def test_logits_dtype_casts_what_the_lm_head_gives() -> None:
    model, per_depth, labels = batch()
    arguments: dict[str, Any] = {"mtp_per_depth_h": per_depth, "labels": labels, "model": model}
    loss = MaskedCrossEntropy(fp32_upcast=False)
    assert calculate_mtp_loss(loss, **arguments, logits_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert calculate_mtp_loss(loss, **arguments).dtype == torch.float64


def test_lm_head_is_gathered_once() -> None:
    model, per_depth, labels = batch()
    gathered: list[Tensor] = []

    class Gathering(FusedLinearCrossEntropy):
        @staticmethod
        def materialize_lm_weight(lm_weight: Tensor, *, grad_reduce_group: object = None) -> Tensor:
            if lm_weight is model.lm_head.weight:
                gathered.append(lm_weight)
                return lm_weight.detach().clone()
            return lm_weight

    loss = Gathering()
    calculate_mtp_loss(loss, mtp_per_depth_h=per_depth, labels=labels, model=model)
    assert len(gathered) == 1
    MTPLossConfig().build(loss, model)({"hidden_states": per_depth[0], "mtp_per_depth_h": per_depth}, labels)
    assert len(gathered) == 2
    weight = model.lm_head.weight.detach().clone()
    calculate_mtp_loss(loss, mtp_per_depth_h=per_depth, labels=labels, model=model, lm_weight=weight)
    assert len(gathered) == 2


def test_labels_get_the_ignored_value_of_the_loss() -> None:
    model, per_depth, labels = batch()
    labels[0, 3] = -100
    arguments: dict[str, Any] = {"mtp_per_depth_h": per_depth, "model": model, "labels": labels}
    expected = calculate_mtp_loss(MaskedCrossEntropy(), **arguments)
    assert torch.equal(calculate_mtp_loss(MaskedCrossEntropy(ignore_index=-1), ignore_index=-1, **arguments), expected)


# --- what is refused

HIDDEN, LABELS = [torch.zeros(B, S, H)] * D, torch.zeros(B, S, dtype=torch.long)
TARGETS = [LABELS] * D


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mtp_per_depth_h": None}, "expected either mtp_per_depth_h or mtp_per_depth_logits, got neither"),
        ({"mtp_per_depth_logits": HIDDEN}, "expected either mtp_per_depth_h or mtp_per_depth_logits, got both"),
        ({"mtp_per_depth_h": []}, "mtp_per_depth_h is empty, expected one tensor per depth"),
        ({"mtp_per_depth_h": None, "mtp_per_depth_logits": []}, "mtp_per_depth_logits is empty"),
        (
            {"mtp_per_depth_h": [HIDDEN[0], HIDDEN[0][:, 1:]]},
            r"does not match labels\.shape \(2, 6\): depth 1: \(2, 5, 4\)",
        ),
        ({"ignore_index": -1}, "ignore_index is -1, but MaskedCrossEntropy leaves out -100"),
        ({"model": nn.Identity()}, "lm_head module not found in model"),
        ({"model": nn.Identity(), "loss_fn": FusedLinearCrossEntropy()}, r"lm_head\.weight not found in model"),
        (
            {"mtp_per_depth_h": None, "mtp_per_depth_logits": HIDDEN, "loss_fn": FusedLinearCrossEntropy()},
            "FusedLinearCrossEntropy computes logits itself and cannot take mtp_per_depth_logits",
        ),
        ({"seq_idx": torch.zeros(3, S)}, r"seq_idx\.shape \(3, 6\) does not match labels\.shape \(2, 6\)"),
        ({"seq_idx": torch.zeros(1, S)}, r"seq_idx\.shape \(1, 6\) does not match"),
        ({"seq_idx": torch.zeros(S - 1)}, r"seq_idx\.shape \(2, 5\) does not match"),
        ({"cu_seqlens": torch.zeros(2, 3)}, r"cu_seqlens has shape \(2, 3\), expected \[K \+ 1\] or \[1, K \+ 1\]"),
        (
            {"mtp_per_depth_targets": TARGETS[:1], "seq_idx": LABELS, "cu_seqlens": torch.tensor([0, S])},
            "cannot be combined with cu_seqlens; cannot be combined with seq_idx; has 1 entries, expected 2",
        ),
        ({"mtp_per_depth_targets": TARGETS, "loss_weights": LABELS}, "cannot be combined with loss_weights"),
        (
            {"mtp_per_depth_targets": [LABELS[:1], LABELS]},
            r"depth 0 has shape \(1, 6\), which does not match labels \(2, 6\)",
        ),
    ],
)
def test_refused_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"mtp_per_depth_h": HIDDEN, "labels": LABELS, "model": Model(torch.zeros(V, H))} | change
    with pytest.raises(ValueError, match=message):
        calculate_mtp_loss(arguments.pop("loss_fn", MaskedCrossEntropy()), **arguments)
