"""Packed rows, padding and masks: a document computes the same wherever it lies."""

from typing import Any

import pytest
import torch
from _dsv4 import D2, PAD, TOLERANCE, golden, predictions, relative, run, training, without_ties
from torch import Tensor
from torch.nn import functional as F

from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM

LENGTHS = (11, 19, 7)  # no start is a multiple of the ratios 4 and 16


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    return without_ties(training(D2))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return golden(D2)["input_ids"]


@pytest.fixture
def seq_idx() -> Tensor:
    """[2, S]: another division in each row."""
    first, second = (torch.tensor(lengths) for lengths in (LENGTHS, LENGTHS[::-1]))
    return torch.stack([torch.arange(3).repeat_interleave(lengths) for lengths in (first, second)])


def test_a_packed_document_equals_its_own_run(model: DeepseekV4ForCausalLM, ids: Tensor, seq_idx: Tensor) -> None:
    packed = predictions(run(model, ids, seq_idx=seq_idx))
    for row in range(2):
        for document in range(3):
            places = seq_idx[row] == document
            alone = predictions(run(model, ids[row : row + 1, places]))
            for one, other in zip(packed, alone, strict=True):
                assert relative(one[row : row + 1, places], other) < TOLERANCE


def test_borders_of_one_row_mean_the_same(model: DeepseekV4ForCausalLM, ids: Tensor, seq_idx: Tensor) -> None:
    borders = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    by_borders = run(model, ids[:1], cu_seqlens=borders)
    by_numbers = run(model, ids[:1], seq_idx=seq_idx[:1])
    for one, other in zip(predictions(by_borders), predictions(by_numbers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("edited", [0, 1, 2])
def test_an_edit_reaches_no_other_document(
    model: DeepseekV4ForCausalLM, ids: Tensor, seq_idx: Tensor, edited: int
) -> None:
    other_ids = torch.where(seq_idx == edited, (ids + 1) % 64, ids)
    before = predictions(run(model, ids, seq_idx=seq_idx))
    after = predictions(run(model, other_ids, seq_idx=seq_idx))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[seq_idx != edited], other[seq_idx != edited], rtol=0, atol=1e-5)
        assert (one - other)[seq_idx == edited].abs().max() > 0.1


def test_without_borders_documents_would_leak(model: DeepseekV4ForCausalLM, ids: Tensor, seq_idx: Tensor) -> None:
    whole, packed = run(model, ids), run(model, ids, seq_idx=seq_idx)
    for one, other in zip(predictions(whole), predictions(packed), strict=True):
        assert relative(one, other) > 0.1


def test_gradients_of_a_packed_row_are_those_of_its_documents(ids: Tensor) -> None:
    def gradient(inputs: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
        model = without_ties(training(D2))
        for given, options in inputs:
            sum(h.square().sum() for h in model(given, **options).mtp_per_depth_h).backward()
        weight = model.get_parameter("mtp.layers.0.self_attn.compressor.kv_proj.weight")
        assert weight.grad is not None
        return weight.grad

    row = ids[:1]
    packed = gradient([(row, {"cu_seqlens": torch.tensor([0, 17, 37])})])
    assert relative(packed, gradient([(row[:, :17], {}), (row[:, 17:], {})])) < 1e-4


def test_padding_on_the_left_is_a_document_of_its_own(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    padded = F.pad(ids[:1, :20], (5, 0), value=1)
    mask = F.pad(torch.ones(1, 20, dtype=torch.long), (5, 0))
    with pytest.raises(ValueError, match="padding before valid tokens"):
        run(model, padded, attention_mask=mask)
    output = run(model, padded, attention_mask=mask, seq_idx=mask)
    for one, other in zip(predictions(output), predictions(run(model, ids[:1, :20])), strict=True):
        assert relative(one[:, 5:], other) < TOLERANCE


def test_padding_on_the_right_does_not_matter() -> None:
    given = golden(PAD)
    model = without_ties(training(PAD))
    padded = run(model, given["input_ids"], attention_mask=given["attention_mask"])
    short = run(model, given["input_ids"][:1, :28])
    for k, (one, other) in enumerate(zip(predictions(padded), predictions(short), strict=True)):
        own = 28 - k  # the last place of depth 0 embeds a padded token, and token 0 without padding
        assert relative(one[:1, :own], other[:, :own]) < TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_mask_of_all_pairs_is_used_as_it_is(model: DeepseekV4ForCausalLM, ids: Tensor, kind: str) -> None:
    distance = torch.arange(37).unsqueeze(1) - torch.arange(37)
    visible = ((distance >= 0) & (distance < 8))[None, None]
    mask = visible if kind == "bool" else torch.zeros(2, 1, 37, 37).masked_fill(~visible, -1e30)
    plain = predictions(run(model, ids))
    for one, other in zip(predictions(run(model, ids, attention_mask=mask)), plain, strict=True):
        assert relative(one, other) < TOLERANCE
    narrow = visible & (distance < 3)
    assert relative(predictions(run(model, ids, attention_mask=narrow))[0], plain[0]) > 1e-2


def test_the_loss_counts_no_prediction_across_a_border(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    row, seq_idx = ids[:1], torch.arange(37).ge(20).long().unsqueeze(0)
    output = run(model, row, seq_idx=seq_idx, labels=row)
    parts = [run(model, part, labels=part) for part in (row[:, :20], row[:, 20:])]
    assert output.loss is not None
    total = sum(float(part.loss) * count for part, count in zip(parts, (19, 16), strict=True) if part.loss is not None)
    assert float(output.loss) == pytest.approx(total / 35, rel=1e-5)


def test_labels_are_shifted_and_may_be_ignored(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, :10] = -100
    output = run(model, ids, labels=labels)
    scores = output.logits.log_softmax(-1)
    picked = scores[:, 9:-1].gather(-1, ids[:, 10:].unsqueeze(-1))
    assert output.loss is not None
    assert float(output.loss) == pytest.approx(float(-picked.mean()), rel=1e-5)


def test_only_some_logits(model: DeepseekV4ForCausalLM, ids: Tensor) -> None:
    whole = run(model, ids)
    assert relative(run(model, ids, logits_to_keep=3).logits, whole.logits[:, -3:]) < TOLERANCE
    places = torch.tensor([4, 30])
    kept = run(model, ids, logits_to_keep=places)
    assert relative(kept.logits, whole.logits[:, places]) < TOLERANCE
    assert relative(predictions(kept)[1], predictions(whole)[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.zeros(2, 37, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep is given"),
        ({"labels": torch.zeros(2, 36, dtype=torch.long)}, r"labels have shape \(2, 36\), expected \(2, 37\)"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"seq_idx": torch.zeros(2, 36)}, r"seq_idx has shape \(2, 36\)"),
        ({"seq_idx": torch.zeros(2, 37), "cu_seqlens": torch.tensor([0, 37])}, "at most one"),
        ({"cu_seqlens": torch.tensor([0, 37])}, "describes one row, but the batch has 2"),
        ({"seq_idx": torch.zeros(2, 37), "attention_mask": torch.ones(2, 1, 37, 37)}, "4-D attention_mask"),
        ({"seq_idx": torch.arange(37).expand(2, -1) // 9, "position_ids": torch.arange(37)[None]}, "from 0 in every"),
        ({"attention_mask": torch.ones(2, 2, 37, 37)}, r"attention_mask has shape \(2, 2, 37, 37\)"),
        ({"position_ids": torch.arange(37)}, r"position_ids has shape \(37,\)"),
    ],
)
def test_arguments_that_contradict_are_refused(
    model: DeepseekV4ForCausalLM, ids: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, ids, **options)


@pytest.mark.parametrize("borders", [[1, 37], [0, 36], [0, 20, 10, 37]])
def test_borders_must_cover_the_row(model: DeepseekV4ForCausalLM, ids: Tensor, borders: list[int]) -> None:
    with pytest.raises(ValueError, match="expected borders that rise from 0 to 37"):
        run(model, ids[:1], cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1, 2]]), r"1 of 3 ids outside 0\.\.63 \(lowest -1, highest 2\)"),
        (torch.tensor([[64, 70, 2]]), r"2 of 3 ids outside 0\.\.63 \(lowest 2, highest 70\)"),
        (torch.tensor([1, 2]), r"int64 \(2,\), expected integers \[B, S\]"),
        (torch.zeros(1, 3), r"float32 \(1, 3\), expected integers"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(model: DeepseekV4ForCausalLM, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, ids)
