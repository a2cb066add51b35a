"""Rows that hold several documents equal the documents run alone."""

from typing import Any

import pytest
import torch
from _nemotron_v3 import D1, MAMBA, PACKED, TOLERANCE, load, predictions, relative, run, some_ids
from torch import Tensor

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM
from mtp_convert.models.nemotron_v3.documents import Documents

LENGTHS = (5, 1, 11, 2)
BORDERS = torch.tensor([0, 5, 6, 17, 19])
NUMBERS = torch.repeat_interleave(torch.tensor([3, 7, 1, 2]), torch.tensor(LENGTHS)).unsqueeze(0)
WAYS: dict[str, dict[str, Any]] = {
    "seq_idx": {"seq_idx": NUMBERS},
    "seq_idx of one row": {"seq_idx": NUMBERS[0]},
    "_packed_seq_ids": {"_packed_seq_ids": NUMBERS},
    "cu_seqlens": {"cu_seqlens": BORDERS, "qkv_format": "thd", "max_seqlen": 11},
    "cu_seqlens [1, K + 1]": {"cu_seqlens": BORDERS.unsqueeze(0)},
    "cu_seqlens with fill": {"cu_seqlens": torch.cat([BORDERS, torch.tensor([-1000, -1000])])},
    "padded before unpadded": {"cu_seqlens_padded": BORDERS, "cu_seqlens": torch.tensor([0, 4, 5, 16, 18])},
}


def alone(model: NemotronHForCausalLM, ids: Tensor) -> list[list[Tensor]]:
    return [predictions(run(model, piece)) for piece in ids.split(LENGTHS, dim=1)]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_describe_documents(way: str) -> None:
    model, ids = load(MAMBA), some_ids(1, 19)
    expected = torch.cat([pieces[0] for pieces in alone(model, ids)], dim=1)
    assert relative(run(model, ids, **WAYS[way]).logits, expected) < TOLERANCE
    assert relative(run(model, ids).logits, expected) > 0.1


def test_depths_differ_only_where_they_read_the_next_document() -> None:
    model, ids = load(MAMBA), some_ids(1, 19)
    found = predictions(run(model, ids, seq_idx=NUMBERS))
    for document, pieces in zip(range(len(LENGTHS)), alone(model, ids), strict=True):
        start, length = int(BORDERS[document]), LENGTHS[document]
        for k in range(2):
            same = max(length - k - 1, 0)
            expected, hidden = pieces[1 + k], found[1 + k][:, start : start + length]
            if same:
                assert relative(hidden[:, :same], expected[:, :same]) < TOLERANCE
            if document < len(LENGTHS) - 1:  # nothing follows the last one, packed or alone
                assert relative(hidden[:, same:], expected[:, same:]) > 1e-3


def test_rows_may_hold_different_documents() -> None:
    model, ids = load(PACKED), some_ids(3, 12)
    seq_idx = torch.tensor([[0] * 12, [0] * 4 + [1] * 8, [2] * 3 + [1] * 3 + [0] * 6])
    found = run(model, ids, seq_idx=seq_idx).logits
    for row, pieces in enumerate([(12,), (4, 8), (3, 3, 6)]):
        expected = torch.cat([run(model, p).logits for p in ids[row : row + 1].split(pieces, dim=1)], dim=1)
        assert relative(found[row : row + 1], expected) < TOLERANCE


def test_one_row_without_a_batch_dimension() -> None:
    model, ids = load(D1), some_ids(1, 19)
    expected = predictions(run(model, ids, cu_seqlens=BORDERS, labels=ids))
    output = run(model, ids[0], cu_seqlens=BORDERS, labels=ids[0])
    assert all(torch.equal(*pair) for pair in zip(predictions(output), expected, strict=True))
    hidden = model.model(ids[0], cu_seqlens=BORDERS)
    assert hidden.shape == (19, 32)
    assert torch.equal(hidden, model.model(ids, cu_seqlens=BORDERS)[0])


def test_the_loss_leaves_out_the_borders() -> None:
    model, ids = load(D1), some_ids(1, 19)
    packed = run(model, ids, labels=ids, seq_idx=NUMBERS).loss
    pieces = [p for p in ids.split(LENGTHS, dim=1) if p.shape[1] > 1]
    losses = [float(run(model, p, labels=p).loss) * (p.shape[1] - 1) for p in pieces]
    assert float(packed) == pytest.approx(sum(losses) / sum(p.shape[1] - 1 for p in pieces), rel=1e-5)


def test_padding_between_documents_is_not_seen() -> None:
    model, ids = load(D1), some_ids(1, 12)
    numbers = torch.tensor([[1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0]])
    found = run(model, ids, _packed_seq_ids=numbers, attention_mask=(numbers != 0).long()).logits
    for start in (0, 6):
        expected = run(model, ids[:, start : start + 4]).logits
        assert relative(found[:, start : start + 4], expected) < TOLERANCE


def test_gradients_stay_within_documents() -> None:
    model, ids = load(MAMBA).train(), some_ids(1, 19)
    embeds = model.model.embed(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, seq_idx=NUMBERS).logits
    (gradient,) = torch.autograd.grad(logits[:, 6:17].square().sum(), embeds)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[6:17].all()
    assert not reached[:6].any()
    assert not reached[17:].any()


def test_rows_of_one_document_are_not_packed() -> None:
    numbers = torch.tensor([[4, 4, 4], [1, 1, 1]])
    assert Documents.from_arguments({"seq_idx": numbers}, 2, 3, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, {"seq_idx": NUMBERS[:, :7]}, r"seq_idx has shape \(1, 7\), expected \(1, 19\)"),
        (1, {"seq_idx": torch.tensor([[1] * 5 + [2] * 9 + [1] * 5])}, r"documents \[1\] go on behind another"),
        (1, {"cu_seqlens": torch.tensor([0, 5, 18])}, r"\[0, 5, 18\], expected borders that rise from 0 to 19"),
        (1, {"cu_seqlens": torch.tensor([0, 9, 5, 19])}, "expected borders that rise"),
        (1, {"cu_seqlens_padded": torch.tensor([3, 19])}, "cu_seqlens_padded is"),
        (2, {"cu_seqlens": BORDERS}, "describes one row, but the batch has 2"),
        (1, {"cp_size": 2, "cp_rank": 0}, "cp_size is 2"),
        (1, {"seq_idx": NUMBERS, "use_cache": True}, "packed rows cannot be cached"),
    ],
)
def test_descriptions_that_do_not_fit(rows: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(load(D1), some_ids(rows, 19), **options)


def test_unknown_arguments_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="unknown arguments of a forward pass: cu_seqlen, mask"):
        run(load(D1), some_ids(1, 19), cu_seqlen=BORDERS, mask=None)
