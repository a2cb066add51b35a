"""Distances and scores, each against numbers worked out by hand or by another formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from mtp_convert.verify import metrics


def test_distance_of_known_numbers() -> None:
    a, b = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.5, -4.0]])
    found = metrics.distance(a, b)
    assert found.max_abs == 0.5
    assert found.mean_abs == 0.25
    assert found.relative == 0.125
    assert found.cosine == pytest.approx(17.5 / math.sqrt(17 * 18.25))


def test_distance_sees_what_is_not_finite() -> None:
    whole = torch.tensor([1.0, float("nan"), float("inf")])
    assert metrics.distance(whole, whole).relative == 0
    for broken in (torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([1.0, float("nan"), -float("inf")])):
        assert metrics.distance(whole, broken).relative == float("inf")
        assert metrics.distance(broken, whole).relative == float("inf")


def test_distance_of_nothing_and_of_zeros() -> None:
    zero = torch.zeros(3)
    assert metrics.distance(zero, zero) == (0, 0, 0, 1)
    assert metrics.distance(zero, torch.ones(3)).relative == float("inf")
    assert metrics.distance(zero, torch.ones(3)).cosine == 0
    with pytest.raises(ValueError, match=r"\[3\] and \[4\]"):
        metrics.distance(zero, torch.ones(4))


def test_kl_equals_torch() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = F.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True, reduction="none")
    assert metrics.kl(a, b) == pytest.approx(float(expected.sum(-1).mean()))
    assert metrics.kl(a, a) == 0


def test_agreement_counts_choices() -> None:
    a = torch.tensor([[[4.0, 3, 2, 1, 0, -1], [4, 3, 2, 1, 0, -1]]])
    b = torch.tensor([[[4.0, 3, 2, 1, 0, -1], [-1, 0, 1, 2, 3, 4]]])
    assert metrics.agreement(a, b, 1) == 0.5
    assert metrics.agreement(a, b, 5) == 0.9  # of the second token's five, four are in both
    assert metrics.agreement(a, b, 100) == 1


def test_scores_of_a_draft_look_one_token_further() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4, 0]])
    vocab = 5

    def sure(tokens: list[int]) -> torch.Tensor:
        return 50.0 * F.one_hot(torch.tensor([tokens]), vocab).double()

    main = sure([1, 2, 3, 4, 0, 0])  # position i predicts token i + 1
    draft = sure([2, 3, 4, 0, 0, 0])  # position i of step 0 predicts token i + 2
    right = metrics.scores("mtp.0.logits", draft, main, ids, (main, main))
    assert right.loss[0] == pytest.approx(0, abs=1e-9)
    assert right.loss[1] > 10
    assert right.acceptance is not None
    assert right.acceptance[0] == 1
    assert right.acceptance[1] == pytest.approx(0.2)
    plain = metrics.scores("logits", main, main, ids)
    assert (plain.kl, plain.top1, plain.top5, plain.acceptance) == (0, 1, 1, None)
    assert plain.loss[0] == pytest.approx(0, abs=1e-9)


def test_rows_too_short_for_a_step_have_no_loss() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    logits = torch.randn(1, 3, 4)
    found = metrics.scores("mtp.2.logits", logits, logits, ids, (logits, logits))
    assert math.isnan(found.loss[0])
    assert found.acceptance is not None
    assert math.isnan(found.acceptance[0])
