"""Pipeline stages cut from the model, and what passes between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from _nemotron_v3 import D1, MAMBA, REPEATED, load, predictions, run, some_ids
from torch import Tensor, nn

from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM

FIRST = ["model.embed_tokens", "model.layers.0", "model.layers.1"]
MIDDLE = ["model.layers.2", "model.layers.3"]
LAST = ["model.layers.4", "model.layers.5", "model.norm", "lm_head"]
SEQ_IDX = torch.tensor([[4, 4, 4, 7, 7, 7, 7], [1, 1, 1, 1, 1, 2, 2]])


def stages(model: NemotronHForCausalLM, *names: list[str]) -> list[NemotronHForCausalLM]:
    return [model.pipeline_stage(stage) for stage in model.customize_pipeline_stage_modules(names)]


def passed_on(pipeline: list[NemotronHForCausalLM], ids: Tensor, **options: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    tensors: Any = (ids,)
    for stage in pipeline:
        tensors = stage(*tensors, **options)
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
    return tuple(tensors)


@pytest.mark.parametrize("folder", [D1, REPEATED, MAMBA], ids=lambda folder: folder.name)
@pytest.mark.parametrize("cut", [(FIRST + MIDDLE, LAST), (FIRST, MIDDLE, LAST)], ids=["2 stages", "3 stages"])
@pytest.mark.parametrize("packed", [{}, {"seq_idx": SEQ_IDX}], ids=["whole rows", "packed"])
def test_stages_equal_the_whole_model_bit_for_bit(folder: Path, cut: Any, packed: dict[str, Tensor]) -> None:  # noqa: ANN401
    model, ids = load(folder).train(), some_ids(2, 7)
    expected = predictions(run(model, ids, **packed))
    *found, seq_idx = passed_on(stages(model, *cut), ids, **packed)
    assert len(found) == len(expected) == 1 + model.num_mtp_depths
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert seq_idx.dtype == torch.int32
    assert torch.equal(seq_idx, packed["seq_idx"].int() if packed else torch.ones(2, 7, dtype=torch.int32))


def test_gradients_of_stages_equal_those_of_the_whole_model() -> None:
    model, ids = load(D1).train(), some_ids(2, 7)
    output = model(ids)
    (output.logits.square().mean() + output.mtp_per_depth_h[0].square().mean()).backward()
    cut = stages(model, FIRST + MIDDLE, LAST)
    logits, hidden, _ = passed_on(cut, ids)
    (logits.square().mean() + hidden.square().mean()).backward()
    for stage in cut:
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


@pytest.mark.parametrize("depths", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_metas_describe_what_stages_take_and_yield(depths: int, training: bool) -> None:
    model = whole(depths)
    tensors: tuple[Tensor, ...] = (some_ids(2, 7),)
    for index, stage in enumerate(stages(model.train(training), FIRST, MIDDLE, LAST)):
        inputs, outputs = stage.get_pipeline_stage_metas(index == 0, 2, 7, torch.float32)
        assert all(t.is_meta for t in (*inputs, *outputs))
        assert [(t.shape, t.dtype) for t in inputs] == [(t.shape, t.dtype) for t in tensors]
        tensors = as_tuple(stage(*tensors))
        assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in tensors]


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def whole(depths: int) -> NemotronHForCausalLM:
    model = load(REPEATED, num_nextn_predict_layers=depths)
    model.compute_mtp_in_eval = False
    return model


def test_evaluation_yields_zeros_in_place_of_hidden_states() -> None:
    model = whole(2)
    logits, *hidden, _ = passed_on(stages(model, FIRST + MIDDLE, LAST), some_ids(1, 5))
    assert torch.equal(logits, run(model, some_ids(1, 5)).logits)
    assert [h.count_nonzero() for h in hidden] == [0, 0]


def test_without_mtp_a_stage_yields_one_tensor() -> None:
    first, last = stages(whole(0), FIRST + MIDDLE, LAST)
    assert isinstance(first(some_ids(1, 5)), Tensor)
    assert isinstance(last(first(some_ids(1, 5))), Tensor)


def test_embeddings_are_those_of_shifted_ids() -> None:
    model, ids = whole(2), torch.tensor([[5, 6, 7, 8]])
    embedded = model._build_mtp_embed_inputs_for_pp(ids)
    for found, shifted in zip(embedded, ([6, 7, 8, 0], [7, 8, 0, 0]), strict=True):
        assert torch.equal(found, model.model.embed(torch.tensor([shifted])))


def test_a_whole_model_takes_finished_embeddings() -> None:
    model, ids = whole(2).train(), some_ids(1, 6)
    given = model._build_mtp_embed_inputs_for_pp(ids)
    expected, found = predictions(run(model, ids)), predictions(run(model, ids, *given))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_names_of_stages() -> None:
    model, given = whole(2), [FIRST + MIDDLE, list(LAST)]
    names = model.customize_pipeline_stage_modules(given, layers_prefix="model.")
    assert names == [FIRST + MIDDLE, [*LAST, "mtp"]]
    assert given[1] == LAST  # the lists given are left alone
    assert model.customize_pipeline_stage_modules(names) == names
    assert whole(0).customize_pipeline_stage_modules(given) == given


def test_which_modules_make_a_stage() -> None:
    assert not whole(2)._is_pipeline_parallel_stage()
    for module, name in (("", "lm_head"), ("model", "embed_tokens")):
        model = whole(2)
        setattr(model.get_submodule(module), name, None)
        assert model._is_pipeline_parallel_stage()
    model = whole(2)
    del model.model.layers["3"]
    assert model._is_pipeline_parallel_stage()
    model = whole(2)
    model.model = nn.Module()  # type: ignore[assignment]  # a stand-in that declares nothing
    assert not model._is_pipeline_parallel_stage()


def test_layers_keep_their_numbers() -> None:
    _, last = stages(whole(2), FIRST + MIDDLE, LAST)
    assert "model.layers.5.norm.weight" in last.state_dict()
    assert "model.layers.3.up_proj.weight" not in last.state_dict()
    assert "mtp.layers.0.eh_proj.weight" in last.state_dict()


def test_a_stage_can_be_initialized_alone() -> None:
    for stage in stages(whole(2), FIRST, MIDDLE, LAST):
        stage.initialize_weights(dtype=torch.float32)
        assert all(p.isfinite().all() for p in stage.parameters())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.customize_pipeline_stage_modules([]), "no stages"),
        (lambda m: m.customize_pipeline_stage_modules([FIRST, LAST]), r"layers\.2 is on 0 stages; .*layers\.3 is on 0"),
        (lambda m: m.customize_pipeline_stage_modules([FIRST, FIRST + MIDDLE, LAST]), r"layers\.0 is on 2 stages"),
        (lambda m: m.pipeline_stage([*FIRST, "model.layers.9"]), r"does not have: \['model\.layers\.9'\]"),
        (lambda m: m.pipeline_stage(LAST), r"the last stage lacks \['mtp'\]"),
        (lambda m: m.pipeline_stage(MIDDLE)(some_ids(1, 4)), "needs hidden states, got torch.int64"),
        (lambda m: m.pipeline_stage(MIDDLE)(torch.zeros(1, 4, 32)), "0 MTP embeddings are given, expected 2"),
        (lambda m: m(some_ids(1, 4), torch.zeros(1, 4, 32)), "1 MTP embeddings are given, expected 2"),
        (lambda m: m.pipeline_stage(FIRST)(some_ids(1, 4), labels=some_ids(1, 4)), "a pipeline stage computes no loss"),
        (lambda m: m.pipeline_stage(MIDDLE)._build_mtp_embed_inputs_for_pp(some_ids(1, 4)), "no embed_tokens"),
        (lambda m: m._build_mtp_embed_inputs_for_pp(torch.zeros(1, 4)), "need token ids, got torch.float32"),
        (lambda m: without_mtp(m)(some_ids(1, 4)), "the last stage lacks mtp"),
    ],
)
def test_refusals(act: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        act(whole(2))


def without_mtp(model: NemotronHForCausalLM) -> NemotronHForCausalLM:
    model.mtp = None
    del model.model.layers["0"]
    return model
