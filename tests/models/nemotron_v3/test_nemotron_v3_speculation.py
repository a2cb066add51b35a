"""Drafting with MTP: the tokens of greedy decoding, in fewer passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GREEDY,
    GROUPS,
    MAMBA,
    REPEATED,
    TINY,
    filled,
    heldout,
    left_padded,
    load,
    some_ids,
    swap_halves,
)
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, SpeculativeOutput
from mtp_convert.models.nemotron_v3.speculation import _Drafter

FOLDERS = [D1, GROUPS, MAMBA, REPEATED]
names = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def few_words(model: NemotronHForCausalLM, words: int) -> NemotronHForCausalLM:
    """Let the head choose among few tokens, so that random depths are right by chance, and often not."""
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.get_parameter("weight")[words:] = 0
    return model


def both(model: NemotronHForCausalLM, ids: Tensor, new: int, **options: Any) -> SpeculativeOutput:  # noqa: ANN401
    """What drafting gives, after checking that it is what plain decoding gives."""
    given = {**GREEDY, "max_new_tokens": new, **options}
    out = model.generate_speculative(ids, **given)
    assert torch.equal(out.sequences, model.generate(ids, **given))
    return out


@names
def test_drafting_gives_the_tokens_of_greedy_decoding(folder: Path) -> None:
    model = few_words(load(folder), 2)
    outs = [both(model, some_ids(1, 5, seed=seed), 16) for seed in range(2)]
    for out in outs:
        # Every round yields what it accepted and one token more; the prompt yields one.
        assert 1 + out.rounds + sum(out.accepted) == 16
        assert len(out.drafted) == model.num_mtp_depths
    accepted, drafted = sum(sum(out.accepted) for out in outs), sum(sum(out.drafted) for out in outs)
    assert 2 <= accepted <= drafted - 4  # both ways of going on were taken


def drafted_afresh(model: NemotronHForCausalLM, ids: Tensor, count: int) -> Tensor:
    """The drafts behind `ids` [B, T + 1], all depths run over all positions, nothing kept from before."""
    assert model.mtp is not None
    hidden, known = model.model(ids[:, :-1]), ids.shape[1]
    for k in range(count):
        embedded = model.model.embed(ids[:, k + 1 :])
        first, *others = model.mtp.depth_layers(k)
        hidden = first(hidden, embed_input=embedded)
        for layer in others:
            hidden = layer(hidden)
        ids = torch.cat([ids, model.logits(hidden[:, -1:]).argmax(-1)], dim=1)
    return ids[:, known:]


@pytest.mark.parametrize(("folder", "depths"), [(MAMBA, 2), (REPEATED, 3)], ids=["own depths", "repeated depth"])
def test_drafts_are_those_of_depths_that_read_everything_again(
    folder: Path, depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[Tensor, Tensor]] = []
    draft = _Drafter.draft

    def spied(self: _Drafter, ids: Tensor, count: int) -> Tensor:
        pairs.append((draft(self, ids, count), drafted_afresh(self.model, ids, count)))
        return pairs[-1][0]

    monkeypatch.setattr(_Drafter, "draft", spied)
    model = few_words(load(folder, num_nextn_predict_layers=depths), 2)
    model.generate_speculative(some_ids(1, 5), max_new_tokens=20, **GREEDY)
    assert len(pairs) > 5
    assert all(torch.equal(*pair) for pair in pairs)
    assert len({tuple(found.flatten().tolist()) for found, _ in pairs}) > 2


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_prompts_shorter_than_the_depths(prompt: int) -> None:
    model = few_words(repeated(4), 3)
    both(model, some_ids(2, prompt), 14)


def repeated(depths: int) -> NemotronHForCausalLM:
    return load(REPEATED, num_nextn_predict_layers=depths)


@pytest.mark.parametrize("folder", [D1, MAMBA], ids=lambda folder: folder.name)
def test_rows_that_are_padded_or_end_early(folder: Path) -> None:
    model, ids = load(folder), some_ids(4, 8)
    out = both(model, ids, 24, attention_mask=left_padded(ids), eos_token_id=list(range(20)))
    ends = (out.sequences[:, 8:] == 0).sum(1)
    assert len(set(ends.tolist())) > 1  # they did not all end at once


def test_logits_processors_and_stopping_criteria_apply() -> None:
    model, ids = few_words(load(D1), 40), some_ids(2, 6)
    plain = both(model, ids, 16).sequences
    penalised = both(model, ids, 16, repetition_penalty=3.0).sequences
    assert not torch.equal(plain, penalised)
    short = both(model, ids, 16, eos_token_id=list(range(32))).sequences
    forced = both(model, ids, 16, eos_token_id=list(range(32)), min_new_tokens=8).sequences
    assert short.shape[1] < 6 + 8 < forced.shape[1]


def test_depths_that_are_always_right_save_most_passes() -> None:
    model = few_words(repeated(3), 0)  # all logits are 0, so that every choice is token 0
    out = both(model, some_ids(2, 4), 21)
    assert out.rounds == 5  # each yields 3 drafts and one token more
    assert out.accepted == out.drafted == (10, 10, 10)
    assert out.acceptance == (1.0, 1.0, 1.0)


def test_a_round_reads_a_bounded_number_of_tokens() -> None:
    model = few_words(repeated(3), 3)
    blocks, depths = [*model.model.layers.values()], [*model.mtp.layers] if model.mtp else []
    read: dict[str, list[int]] = {"model": [], "mtp": []}
    for name, module in (("model", blocks[0]), ("mtp", depths[0])):
        module.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0].shape[1]))
    out = model.generate_speculative(some_ids(1, 25), max_new_tokens=24, **GREEDY)
    assert read["model"][0] == 25
    assert read["mtp"][:3] == [24, 23, 22]
    assert len(read["model"]) == 1 + out.rounds
    assert max(read["model"][1:]) == 4
    assert max(read["mtp"][3:]) <= 4


def test_a_trained_depth_is_accepted_and_a_damaged_one_is_not() -> None:
    model = load(TINY, dtype=torch.float32)
    ids = heldout(1, 160)
    trained = both(model, ids, 60)
    assert trained.acceptance[0] > 0.6
    assert trained.rounds < 60 / 1.5
    swap_halves(model, "mtp.layers.0.eh_proj.weight")
    assert both(model, ids, 60).acceptance[0] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "do_sample is true"),
        ({"num_beams": 2}, "num_beams is 2"),
    ],
)
def test_drafting_refuses_what_is_not_greedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(D1).generate_speculative(some_ids(1, 4), **{**GREEDY, "max_new_tokens": 4, **options})


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed() -> None:
    streamer = Collector()
    out = load(D1).generate_speculative(some_ids(1, 4), streamer=streamer, max_new_tokens=6, **GREEDY)
    assert streamer.seen == out.sequences[0].tolist()
    assert streamer.ended


def test_drafting_refuses_a_used_cache_and_a_model_without_mtp() -> None:
    model, ids = load(D1), some_ids(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        model.generate_speculative(ids, past_key_values=filled(model, ids), max_new_tokens=4, **GREEDY)
    with pytest.raises(ValueError, match="has no MTP depth"):
        load(D1, num_nextn_predict_layers=0).generate_speculative(ids, max_new_tokens=4)
