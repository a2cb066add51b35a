"""Decoding with a cache, and transformers' loops over it."""

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
    TOLERANCE,
    filled,
    fresh,
    left_padded,
    load,
    relative,
    run,
    some_ids,
)
from transformers import DynamicCache
from transformers import NemotronHForCausalLM as TransformersModel

from mtp_convert.models.nemotron_v3 import NemotronHybridCache, Numerics
from mtp_convert.models.nemotron_v3.cache import KeyValueLayer, MambaLayer

FOLDERS = [D1, GROUPS, MAMBA, REPEATED]
names = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


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
