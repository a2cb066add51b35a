"""Decoding with a cache, transformers' loops over it, and drafting with MTP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from _nemotron_v3 import D1, GROUPS, MAMBA, REPEATED, TINY, TOLERANCE, fresh, heldout, load, relative, run, some_ids
from torch import Tensor
from transformers import DynamicCache
from transformers import NemotronHForCausalLM as TransformersModel
from transformers.generation.streamers import BaseStreamer

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM, NemotronHybridCache, Numerics, SpeculativeOutput
from mtp_convert.models.nemotron_v3.cache import KeyValueLayer, MambaLayer
from mtp_convert.models.nemotron_v3.speculation import _Drafter

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FOLDERS = [D1, GROUPS, MAMBA, REPEATED]
names = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("folder", "numerics", "pad"),
    [
        (D1, Numerics(), False),
        (GROUPS, Numerics(), True),
        (MAMBA, Numerics.automodel(), True),
        (REPEATED, Numerics.automodel(), False),
    ],
    ids=["transformers", "transformers, padded", "automodel, padded", "automodel"],
)
def test_prefill_and_decoding_equal_one_forward_pass(folder: Path, numerics: Numerics, pad: bool) -> None:
    model, ids = load(folder, numerics=numerics), some_ids(2, 21)
    mask = left_padded(ids) if pad else torch.ones_like(ids)
    expected = run(model, ids, attention_mask=mask).logits
    cache = model.new_cache()
    pieces = [ids[:, :2], ids[:, 2:9], *ids[:, 9:].split(1, dim=1)]  # 2 tokens are fewer than the convolution reads
    found = []
    for piece in pieces:
        seen = mask[:, : cache.length + piece.shape[1]]
        found.append(run(model, piece, attention_mask=seen, past_key_values=cache).logits)
    real = mask.bool()
    assert relative(torch.cat(found, dim=1)[real], expected[real]) < TOLERANCE
    assert cache.get_seq_length() == cache.length == 21


def test_small_time_steps_are_raised_in_decoding_too() -> None:
    """transformers raises them to `time_step_min` in whole sequences alone."""
    model, ids = fresh(D1), some_ids(1, 24)
    for name, tensor in model.state_dict().items():
        if name.endswith("dt_bias"):
            tensor.fill_(-9.0)
    expected = run(model, ids).logits
    cache = model.new_cache()
    found = [run(model, token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
    assert relative(torch.cat(found, dim=1), expected) < TOLERANCE
    unlimited = fresh(D1, numerics=Numerics(time_step_limit="time_step_limit"))
    unlimited.load_state_dict(model.state_dict())
    assert relative(run(unlimited, ids).logits, expected) > 10 * TOLERANCE  # so the limit matters here


@names
def test_greedy_generation_equals_stepwise_argmax(folder: Path) -> None:
    model, ids = load(folder), some_ids(3, 6)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, run(model, expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=8, **GREEDY), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 2},
    ],
    ids=["greedy", "sample", "beams", "chunked prefill"],
)
def test_generation_equals_transformers(options: dict[str, Any]) -> None:
    ids = some_ids(3, 7)
    found = []
    for model in (load(GROUPS), TransformersModel.from_pretrained(GROUPS)):
        torch.manual_seed(0)
        given = {"attention_mask": left_padded(ids), "max_new_tokens": 12, "eos_token_id": 7, "pad_token_id": 0}
        found.append(model.generate(ids, **given, **options))
    assert found[0].shape[1] > 7
    assert torch.equal(*found)


def test_embeddings_as_prompt_equal_ids_as_prompt() -> None:
    model, ids = load(D1), some_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)[:, 6:]
    found = model.generate(inputs_embeds=model.model.embed(ids), max_new_tokens=8, **GREEDY)
    assert torch.equal(found, expected)


def test_generation_goes_on_from_a_cache() -> None:
    model, ids = load(D1), some_ids(1, 5)
    expected = model.generate(ids, max_new_tokens=10, **GREEDY)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    found = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, **GREEDY)
    assert torch.equal(found, expected)


def test_a_decoding_step_reads_one_token_however_many_went_before() -> None:
    model, ids = load(D1), some_ids(1, 30)
    lengths: list[int] = []
    for block in model.model.layers.values():
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(ids, max_new_tokens=9, **GREEDY)
    blocks = len(model.model.layers)
    assert lengths == [30] * blocks + [1] * 8 * blocks


def test_prepared_inputs_are_what_the_cache_does_not_hold() -> None:
    model, ids = load(D1), some_ids(2, 6)
    inputs = model.prepare_inputs_for_generation(ids)
    assert torch.equal(inputs["input_ids"], ids)
    cache = inputs["past_key_values"]
    assert isinstance(cache, NemotronHybridCache)
    run(model, **inputs)
    inputs = model.prepare_inputs_for_generation(torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache)
    assert torch.equal(inputs["input_ids"], ids[:, :1])
    embeds = model.model.embed(ids)
    inputs = model.prepare_inputs_for_generation(ids[:, :0], inputs_embeds=embeds)
    assert torch.equal(inputs["inputs_embeds"], embeds)
    assert model.prepare_inputs_for_generation(ids, use_cache=False)["past_key_values"] is None


# The cache itself


def filled(model: NemotronHForCausalLM, ids: Tensor, *, record: bool = False) -> NemotronHybridCache:
    cache = model.new_cache()
    run(model, ids, past_key_values=cache)
    if record:
        cache.activate_past_recording()
    return cache


def test_the_cache_has_the_states_of_its_blocks() -> None:
    cache = filled(load(D1), some_ids(3, 9))  # blocks M*E-ME
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["MambaLayer", "KeyValueLayer", "StatelessLayer", "StatelessLayer", "MambaLayer", "StatelessLayer"]
    state = cache.mamba(0).state
    assert state is not None
    assert state.conv.shape == (3, 96, 4)
    assert state.ssm.shape == (3, 4, 8, 16)
    assert state.ssm.dtype == torch.float32
    assert cache.layers[1].keys.shape == (3, 2, 9, 8)
    assert cache.get_mask_sizes(5, 0) == (14, 0)
    assert cache.has_previous_state
    cache.reset()
    assert (cache.length, cache.has_previous_state, cache.mamba(0).state) == (0, False, None)
    assert cache.layers[1].get_seq_length() == 0


@pytest.mark.parametrize("removed", [0, 1, 4, 5])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_read(removed: int) -> None:
    model, ids = load(MAMBA), some_ids(2, 14)
    cache = filled(model, ids[:, :9], record=True)
    run(model, torch.cat([ids[:, 9 : 14 - removed], 63 - ids[:, :removed]], dim=1), past_key_values=cache)
    cache.crop(-removed)
    assert cache.length == 14 - removed
    following = some_ids(2, 3, seed=1)
    expected = run(model, torch.cat([ids[:, : 14 - removed], following], dim=1)).logits[:, -3:]
    assert relative(run(model, following, past_key_values=cache).logits, expected) < TOLERANCE


def test_what_was_not_recorded_cannot_be_undone() -> None:
    model, ids = load(D1), some_ids(1, 6)
    with pytest.raises(ValueError, match=r"crop\(-1\): expected -0 to 0"):
        filled(model, ids).crop(-1)
    cache = filled(model, ids, record=True)
    run(model, ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop\(-3\): expected -2 to 0"):
        cache.crop(-3)
    for number in (-9, 1):
        with pytest.raises(ValueError, match="expected -8 to 0, as many tokens as are cached"):
            cache.crop(number)


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    model, ids = load(D1), some_ids(3, 8)
    expected = run(model, torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    order = torch.tensor([2, 0, 0])
    for change in ("reorder_cache", "batch_select_indices"):
        cache = filled(model, ids)
        getattr(cache, change)(order)
        found = run(model, ids[order, :1], past_key_values=cache).logits
        assert relative(found, expected[order]) < TOLERANCE
    cache = filled(model, ids)
    cache.batch_repeat_interleave(2)
    found = run(model, ids[:, :1].repeat_interleave(2, dim=0), past_key_values=cache).logits
    assert relative(found, expected.repeat_interleave(2, dim=0)) < TOLERANCE


def test_keys_are_copied_seldom() -> None:
    layer = KeyValueLayer()
    token = torch.ones(1, 2, 1, 4)
    places = set()
    for i in range(100):
        keys, _ = layer.update(token * i, token)
        places.add(keys.data_ptr())
    assert torch.equal(keys[0, 0, :, 0], torch.arange(100.0))
    assert len(places) < 8


def test_a_cache_can_be_trained_through() -> None:
    model, ids = load(D1), some_ids(1, 8)
    weights = [model.get_parameter(f"model.layers.{n}.weight") for n in ("1.mixer.k_proj", "0.mixer.in_proj")]
    expected = torch.autograd.grad(model(ids).logits.square().mean(), weights)
    cache = model.new_cache()
    found = [model(piece, past_key_values=cache).logits for piece in (ids[:, :4], ids[:, 4:6], ids[:, 6:7], ids[:, 7:])]
    gradients = torch.autograd.grad(torch.cat(found, dim=1).square().mean(), weights)
    assert all(relative(*pair) < TOLERANCE for pair in zip(gradients, expected, strict=True))


# Drafting with MTP


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
    weight = model.state_dict()["mtp.layers.0.eh_proj.weight"]
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
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


def test_other_caches_are_refused() -> None:
    model, ids = load(D1), some_ids(1, 4)
    with pytest.raises(TypeError, match="DynamicCache"):
        run(model, ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="its own cache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(AssertionError, match="no Mamba block"):
        model.new_cache().mamba(1)


def test_a_state_before_the_first_token_is_left_alone() -> None:
    layer = MambaLayer()
    layer.crop(0)
    layer.batch_select_indices(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    assert layer.state is None
    assert layer.get_max_length() == -1
