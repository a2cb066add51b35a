"""The MTP loss: stored outputs of megatron-core, its gradients, plain autograd, and the log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from _gloo import LOGITS, Results
from safetensors.torch import load_file
from torch import Tensor

from mtp_convert.models.megatron.groups import Member
from mtp_convert.models.megatron.loss import (
    MTPLossAutoScaler,
    language_model_loss,
    mtp_depth_targets,
    predict_tokens,
    process_mtp_loss,
)
from mtp_convert.models.megatron.loss_logging import MTPLossLoggingHelper
from mtp_convert.models.megatron.packed import PackedSeqParams

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden" / "megatron"
LOSSES = json.loads((Path(__file__).parent / "data" / "losses.json").read_text())["cases"]
SEQ, BATCH, HIDDEN, VOCAB = 6, 2, 4, 7  # of the reference losses


@dataclass(frozen=True)
class Config:
    mtp_num_layers: int | None = 2
    mtp_loss_scaling_factor: float | None = 0.1
    calculate_per_token_loss: bool = False
    mtp_detach_heads: bool = False


@dataclass
class Head:
    weight: Tensor | None  # [V, H]
    gather_output: bool = False

    def __call__(
        self, hidden: Tensor, *, weight: Tensor | None, runtime_gather_output: bool | None
    ) -> tuple[Tensor, None]:
        used = self.weight if weight is None else weight
        assert used is not None
        return hidden @ used.t(), None


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Tracker and loss scale belong to the process."""
    MTPLossLoggingHelper.tracker.clear()
    yield
    MTPLossLoggingHelper.tracker.clear()
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def attach(hidden: Tensor, head: Head, config: Config, **kwargs: object) -> Tensor:
    """`process_mtp_loss` with defaults for what a test does not look at."""
    options: dict[str, Any] = {
        "labels": None,
        "loss_mask": None,
        "output_weight": None,
        "runtime_gather_output": None,
        "is_training": True,
        "compute_language_model_loss": language_model_loss,
    }
    return process_mtp_loss(hidden, output_layer=head, config=config, **(options | kwargs))


@pytest.mark.parametrize("name", ["hyb_m", "hyb_rep", "dsv3_te", "qwen2_te"])
def test_losses_of_stored_logits_are_those_that_megatron_core_logged(name: str) -> None:
    stored = load_file(GOLDEN / name / "out.safetensors")
    tokens = stored["tokens"]
    labels = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
    mask = torch.ones(labels.shape)
    mask[:, -1] = 0
    lm_loss = language_model_loss(labels, stored["logits"].transpose(0, 1))
    torch.testing.assert_close(lm_loss, stored["lm_loss"], rtol=0, atol=1e-6)
    depths = len(stored["mtp_loss"])
    for depth, target in enumerate(mtp_depth_targets(labels, mask, depths)):
        logits = stored[f"logits_mtp{depth}"].transpose(0, 1)
        mean = target.mean(target.token_loss(logits, language_model_loss))
        torch.testing.assert_close(mean, stored["mtp_loss"][depth], rtol=0, atol=1e-6)
    assert depths == {"dsv3_te": 1}.get(name, 2)


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(*shape)


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "part": lambda: (numbered(BATCH, SEQ) % 4 > 0).float(),
    "zero": lambda: torch.zeros(BATCH, SEQ),
    "tail": lambda: torch.cat([torch.ones(BATCH, SEQ - 1), torch.zeros(BATCH, 1)], 1),
}


@pytest.mark.parametrize("case", LOSSES, ids=lambda c: str(c["settings"]))
def test_gradients_and_counts_are_those_of_megatron_core(case: dict[str, Any]) -> None:
    how = {"per_token": False, "mask": "none", "labels": True, "cu": None, "detach": False, "scale": None} | {
        "main": 0.5, "depths": 2, "factor": 0.1, **case["settings"]
    }  # fmt: skip
    hidden = (numbered((1 + how["depths"]) * SEQ, BATCH, HIDDEN) * 0.7).sin().requires_grad_()
    head = Head((numbered(VOCAB, HIDDEN) * 1.3).cos().requires_grad_())
    MTPLossAutoScaler.set_loss_scale(torch.tensor(how["main"]))
    main = attach(
        hidden,
        head,
        Config(how["depths"], how["factor"], how["per_token"], how["detach"]),
        labels=((numbered(BATCH, SEQ) * 3 + 2) % VOCAB).long() if how["labels"] else None,
        loss_mask=MASKS[how["mask"]](),
        packed_seq_params=how["cu"] and PackedSeqParams(cu_seqlens_q=torch.tensor(how["cu"])),
        scale_logits_fn=how["scale"] and (lambda logits: logits * how["scale"]),
        input_ids=((numbered(BATCH, SEQ) * 5) % VOCAB).long(),
    )
    assert torch.equal(main, hidden[:SEQ])
    assert case["main_equal"]
    (main * numbered(SEQ, BATCH, HIDDEN) * 0.1).sum().backward()
    for name in ("loss_values", "correct_values", "total_values"):
        torch.testing.assert_close(MTPLossLoggingHelper.tracker[name], torch.tensor(case[name]))
    gradients = {"hidden_grad": hidden.grad, "weight_grad": head.weight is not None and head.weight.grad}
    for name, gradient in gradients.items():
        assert (gradient is None) == (case[name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.flatten(), torch.tensor(case[name]), rtol=1e-5, atol=1e-7)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_scaler_gives_the_gradients_of_a_summed_loss() -> None:
    weight, hidden = random(3, 3).requires_grad_(), random(4, 3)

    def gradient(scaled: bool) -> Tensor:
        output, side = hidden @ weight, (hidden @ weight.t()).pow(2)
        if scaled:
            main: Tensor = MTPLossAutoScaler.apply(output, side)
            assert torch.equal(main, output)
            loss = main.sin().sum()
        else:
            loss = output.sin().sum() + 0.25 * side.sum()
        return torch.autograd.grad(loss, weight)[0]

    MTPLossAutoScaler.set_loss_scale(torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(gradient(scaled=True), gradient(scaled=False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_token", [False, True])
def test_both_normalisations_are_a_weighted_sum_of_depth_losses(per_token: bool) -> None:
    hidden, weight = random(3 * SEQ, BATCH, HIDDEN).requires_grad_(), random(VOCAB, HIDDEN).requires_grad_()
    labels = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % VOCAB
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.float64)
    expected = hidden[:SEQ].sin().sum()
    for depth in (0, 1):
        kept = SEQ - depth - 1
        logits = (hidden[(depth + 1) * SEQ : (depth + 1) * SEQ + kept] @ weight.t()).transpose(0, 1)
        token = -logits.log_softmax(-1).gather(-1, labels[:, depth + 1 :, None])[..., 0]
        counted = mask[:, depth + 1 :]
        expected = expected + 0.3 / 2 * (token * counted).sum() / counted.sum() * (mask.sum() if per_token else 1)
    config = Config(mtp_loss_scaling_factor=0.3, calculate_per_token_loss=per_token)
    main = attach(hidden, Head(weight), config, labels=labels, loss_mask=mask)
    got = torch.autograd.grad(main.sin().sum(), (hidden, weight))
    for one, other in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_detached_heads_leave_the_shared_output_weight_alone() -> None:
    hidden, weight = random(3 * SEQ, BATCH, HIDDEN).requires_grad_(), random(VOCAB, HIDDEN).requires_grad_()
    labels = torch.zeros(BATCH, SEQ, dtype=torch.long)
    for own, passed in ((weight, None), (None, weight)):
        main = attach(hidden, Head(own), Config(mtp_detach_heads=True), labels=labels, output_weight=passed)
        to_hidden, to_weight = torch.autograd.grad(main.sum(), (hidden, weight), allow_unused=True)
        assert to_weight is None
        assert to_hidden[SEQ:].abs().sum() > 0
    with pytest.raises(ValueError, match="no weight of its own"):
        attach(hidden, Head(None), Config(mtp_detach_heads=True), labels=labels)


def test_without_labels_or_inputs_nothing_is_attached() -> None:
    hidden = random(3 * SEQ, BATCH, HIDDEN).requires_grad_()
    main = attach(hidden, Head(random(VOCAB, HIDDEN)), Config())
    assert torch.equal(main, hidden[:SEQ])
    assert torch.equal(torch.autograd.grad(main.sum(), hidden)[0][SEQ:], torch.zeros_like(hidden[SEQ:]))
    assert MTPLossLoggingHelper.tracker == {}


def test_nothing_is_logged_outside_training() -> None:
    labels = torch.zeros(BATCH, SEQ, dtype=torch.long)
    attach(random(3 * SEQ, BATCH, HIDDEN), Head(random(VOCAB, HIDDEN)), Config(), labels=labels, is_training=False)
    assert MTPLossLoggingHelper.tracker == {}


def test_hidden_states_of_other_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="17 positions are not 3 equal parts"):
        attach(random(17, BATCH, HIDDEN), Head(random(VOCAB, HIDDEN)), Config())


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits, labels = numbered(2, 1, 5).bfloat16(), torch.tensor([[3, 0]])
    loss = language_model_loss(labels, logits)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, language_model_loss(labels, logits.float()))


def test_a_vocabulary_over_ranks_predicts_like_a_whole_one(gloo: Results) -> None:
    expected = LOGITS.argmax(-1)
    assert torch.equal(predict_tokens(LOGITS, Member()), expected)
    assert [torch.equal(rank["predicted"], expected) for rank in gloo] == [True] * 4
    with pytest.raises(ValueError, match="2 ranks needs a torch"):
        predict_tokens(LOGITS, Member(0, 2))


@pytest.mark.parametrize(
    ("gathers", "runtime", "refused"),
    [(False, None, True), (True, None, False), (False, True, False), (True, False, True)],
)
def test_gathered_logits_are_predicted_without_the_other_ranks(
    gathers: bool, runtime: bool | None, refused: bool
) -> None:
    options = {"labels": torch.zeros(BATCH, SEQ, dtype=torch.long), "tp_group": Member(0, 2)}
    head = Head(random(VOCAB, HIDDEN), gather_output=gathers)
    hidden = random(3 * SEQ, BATCH, HIDDEN)
    if refused:
        with pytest.raises(ValueError, match="vocabulary over 2 ranks"):
            attach(hidden, head, Config(), runtime_gather_output=runtime, **options)
    else:
        attach(hidden, head, Config(), runtime_gather_output=runtime, **options)
        assert MTPLossLoggingHelper.tracker["total_values"].tolist() == [10, 8]


def test_logged_values_are_reduced_over_their_groups(gloo: Results) -> None:
    # ranks log 1, 2, 3, 4: pairs make 3, 3, 7, 7 of that, and the average over all is 5
    for rank in gloo:
        values = {name: value.tolist() for name, value in rank["reduced"].items()}
        assert values == {"loss_values": [5, 50], "correct_values": [12, 12], "total_values": [28, 28]}


@dataclass
class Log:
    """A TensorBoard writer and a Weights & Biases run at once."""

    scalars: dict[tuple[str, int], float] = field(default_factory=dict)

    def add_scalar(self, tag: str, value: Tensor, step: int) -> None:
        self.scalars[tag, step] = pytest.approx(value.item())

    def log(self, data: Mapping[str, Tensor], step: int) -> None:
        for tag, value in data.items():
            self.add_scalar(tag, value, step)


def save(loss: float, correct: float, total: float, depth: int | None, depths: int = 2) -> None:
    numbers = (torch.tensor(v) for v in (loss, correct, total))
    MTPLossLoggingHelper.save_metrics_to_tracker(*numbers, depth, depths)


def test_a_step_is_summed_written_and_cleared() -> None:
    board, wandb, totals = Log(), Log(), {"mtp_1 loss": torch.tensor(100.0)}
    for correct in (1.0, 2.0):
        save(3.0, correct, 4.0, 0)
        save(5.0, 0.0, 0.0, 1)
    save(7.0, 7.0, 7.0, None)
    MTPLossLoggingHelper.track_mtp_metrics(0.5, 10, board, wandb, totals)
    save(1.0, 4.0, 4.0, 0)
    MTPLossLoggingHelper.track_mtp_metrics(0.5, 11, board, wandb, totals)
    expected = {
        ("mtp_1 loss", 10): 3.0,
        ("mtp_1_acceptance_rate", 10): 37.5,
        ("mtp_1_cumulative_acceptance_rate", 10): 37.5,
        ("mtp_2 loss", 10): 5.0,
        ("mtp_2_acceptance_rate", 10): 0.0,
        ("mtp_2_cumulative_acceptance_rate", 10): 0.0,
        ("mtp_1 loss", 11): 0.5,
        ("mtp_1_acceptance_rate", 11): 100.0,
        ("mtp_1_cumulative_acceptance_rate", 11): 100 * 7 / 12,
        ("mtp_2 loss", 11): 0.0,
        ("mtp_2_acceptance_rate", 11): 0.0,
        ("mtp_2_cumulative_acceptance_rate", 11): 0.0,
    }
    assert board.scalars == expected
    assert wandb.scalars == expected
    assert {name: value.item() for name, value in totals.items()} == {"mtp_1 loss": 103.5, "mtp_2 loss": 5.0}
    assert MTPLossLoggingHelper.tracker["loss_values"].tolist() == [0, 0]


def test_losses_alone_have_no_acceptance_rate() -> None:
    board = Log()
    MTPLossLoggingHelper.save_loss_to_tracker(torch.tensor(2.0, requires_grad=True), 0, 1)
    assert not MTPLossLoggingHelper.tracker["loss_values"].requires_grad
    MTPLossLoggingHelper.track_mtp_metrics(1.0, 1, board)
    assert board.scalars == {("mtp_1 loss", 1): 2.0}


def test_nothing_saved_is_nothing_written() -> None:
    board = Log()
    MTPLossLoggingHelper.track_mtp_metrics(1.0, 1, board)
    assert board.scalars == {}


def test_cleaning_forgets_the_groups_and_another_model_starts_afresh() -> None:
    MTPLossLoggingHelper.save_loss_to_tracker(torch.tensor(2.0), 0, 1, Member(), Member())
    MTPLossLoggingHelper.clean_loss_in_tracker()
    tracker = MTPLossLoggingHelper.tracker
    assert tracker["loss_values"].tolist() == [0]
    assert tracker["reduce_group"] is None
    assert tracker["avg_group"] is None
    save(1.0, 1.0, 2.0, 0, depths=1)
    MTPLossLoggingHelper.track_mtp_metrics(1.0, 1, None)
    save(1.0, 1.0, 1.0, 2, depths=3)
    MTPLossLoggingHelper.track_mtp_metrics(1.0, 2, log := Log())
    assert log.scalars["mtp_3_cumulative_acceptance_rate", 2] == 100
    assert tracker["loss_values"].tolist() == [0, 0, 0]


def test_groups_that_cannot_communicate_are_refused() -> None:
    MTPLossLoggingHelper.save_loss_to_tracker(torch.tensor(2.0), 0, 1, avg_group=Member(1, 2))
    with pytest.raises(ValueError, match="reducing over 2 ranks needs a torch"):
        MTPLossLoggingHelper.reduce_loss_in_tracker()
