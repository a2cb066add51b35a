"""DeepSeek-V4 cut into pipeline stages."""

from typing import Any

import pytest
import torch
from _dsv4 import D1, D2, PAD, golden, predictions, run, training
from torch import Tensor, nn

from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM

LAYERS = [f"model.layers.{i}" for i in range(4)]
TWO = [["model.embed_tokens", *LAYERS[:2]], [*LAYERS[2:], "model.norm", "lm_head"]]
THREE = [TWO[0], [LAYERS[2]], [LAYERS[3], "model.norm", "lm_head"]]


def stages_of(model: DeepseekV4ForCausalLM, names: list[list[str]]) -> list[DeepseekV4ForCausalLM]:
    return [model.pipeline_stage(stage) for stage in model.customize_pipeline_stage_modules(names)]


def chain(stages: list[DeepseekV4ForCausalLM], ids: Tensor, **options: Tensor) -> tuple[Tensor, ...]:
    """Run the stages one after another; what passes between them must have the promised shapes."""
    passed: tuple[Tensor, ...] = (ids,)
    for stage in stages:
        metas = stage.get_pipeline_stage_metas(stage is stages[0], ids.shape[0], ids.shape[1], torch.float32)
        for given, promised in ((passed, metas[0]), (stage(*passed, **options), metas[1])):
            passed = given if isinstance(given, tuple) else (given,)
            assert [(t.shape, t.dtype) for t in passed] == [(t.shape, t.dtype) for t in promised]
            assert all(t.is_meta for t in promised)
    return passed


@pytest.mark.parametrize("names", [TWO, THREE], ids=["two", "three"])
def test_stages_equal_the_whole_model_bit_for_bit(names: list[list[str]]) -> None:
    model = training(D2)
    ids = golden(D2)["input_ids"]
    stages = stages_of(model, names)
    seq_idx = torch.arange(37).ge(13).long().expand(2, -1)
    for options in ({}, {"seq_idx": seq_idx}):
        with torch.no_grad():
            outputs = chain(stages, ids, **options)
        for one, other in zip(outputs, predictions(run(model, ids, **options)), strict=True):
            assert torch.equal(one, other)


def test_padding_travels_by_keyword() -> None:
    given = golden(PAD)
    model = training(PAD)
    mask = {"attention_mask": given["attention_mask"]}
    with torch.no_grad():
        outputs = chain(stages_of(model, TWO), given["input_ids"], **mask)
    for one, other in zip(outputs, predictions(run(model, given["input_ids"], **mask)), strict=True):
        assert torch.equal(one, other)


def test_gradients_cross_the_stages() -> None:
    model = training(D2)
    ids = golden(D2)["input_ids"]
    stages = stages_of(model, TWO)
    for outputs in (chain(stages, ids), predictions(model(ids))):
        sum(t.square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    expected = dict(model.named_parameters())
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if ".indexer." not in name:
                assert parameter.grad is not None, name
                assert torch.equal(parameter.grad, expected[name].grad), name  # type: ignore[arg-type]


def test_every_stage_gets_what_it_depends_on() -> None:
    model = training(D2)
    kept = [list(stage) for stage in THREE]
    names = model.customize_pipeline_stage_modules(THREE, layers_prefix="model.")
    assert kept == THREE
    for given, stage in zip(THREE, names, strict=True):
        assert stage[: len(given)] == given
        assert "model.rotary_emb" in stage
    assert [("mtp" in stage, "model.hc_head" in stage) for stage in names] == [(False, False)] * 2 + [(True, True)]
    assert model.customize_pipeline_stage_modules(names) == names


def test_another_owner_of_the_layers_decides_what_is_shared() -> None:
    class Text(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

    model = training(D2)
    text = Text(model.model.layers)
    names = [["text.embed_tokens"], [f"text.layers.{i}" for i in range(4)]]
    with pytest.raises(ValueError, match=r"text\.layers\.0 chooses experts by token id"):
        model.customize_pipeline_stage_modules(names, layers_prefix="text.", text_model=text)
    one = [[name for stage in names for name in stage]]
    assert model.customize_pipeline_stage_modules(one, layers_prefix="text.", text_model=text)[0][5:] == [
        "text.rotary_emb",
        "mtp",
    ]


def test_stages_hold_the_whole_state_between_them() -> None:
    model = training(D2)
    stages = stages_of(model, THREE)
    held = [set(stage.state_dict()) for stage in stages]
    assert set.union(*held) == set(model.state_dict())
    assert sum(len(part) for part in held) == len(model.state_dict())
    last: Any = stages[-1]
    assert last.mtp.layers[0].rotaries["main"] is last.model.rotary_emb
    assert last.model.rotary_emb is not model.model.rotary_emb


def test_without_mtp_one_tensor_passes() -> None:
    model = training(D1, num_nextn_predict_layers=0)
    ids = golden(D1)["input_ids"]
    first, last = stages_of(model, TWO)
    with torch.no_grad():
        streams = first(ids)
        assert isinstance(streams, Tensor)
        logits = last(streams)
    assert isinstance(logits, Tensor)
    assert torch.equal(logits, run(model, ids).logits)


def test_a_last_stage_runs_mtp_in_evaluation_too() -> None:
    model = training(D1)
    ids = golden(D1)["input_ids"]
    expected = predictions(run(model, ids))
    with torch.no_grad():
        outputs = chain(stages_of(model.eval(), TWO), ids)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([["model.embed_tokens", *LAYERS[:2]], [*LAYERS[1:], "lm_head"]], r"layers\.1 is on 2 stages"),
        ([["model.embed_tokens", LAYERS[0]], [*LAYERS[2:], "lm_head"]], r"layers\.1 is on 0 stages"),
        ([["model.embed_tokens"], [*LAYERS, "lm_head"]], r"layers\.0 chooses experts by token id"),
        ([], "no stages"),
    ],
)
def test_stages_that_cannot_run_are_refused(names: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(D2).customize_pipeline_stage_modules(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.4", "model.nothing"], r"does not have: \['model.layers.4', 'model.nothing'\]"),
        ([LAYERS[3], "lm_head", "model.norm"], r"lacks \['model.hc_head', 'mtp'\]"),
    ],
)
def test_a_stage_must_be_whole(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(D2).pipeline_stage(names)


def test_stages_refuse_what_is_not_theirs() -> None:
    model = training(D2)
    ids = golden(D2)["input_ids"]
    first, last = stages_of(model, TWO)
    with torch.no_grad():
        streams, *embeds = first(ids)
    with pytest.raises(ValueError, match="0 MTP embeddings, expected 2"):
        last(streams)
    with pytest.raises(ValueError, match=r"int64 \(2, 37\), expected streams"):
        last(ids, *embeds)
    with pytest.raises(ValueError, match="2 MTP embeddings are given to the first stage"):
        first(ids, *embeds)
    with pytest.raises(ValueError, match="its schedule's"):
        last(streams, *embeds, labels=ids)
    with pytest.raises(ValueError, match=r"9 of .* ids outside"):
        first(ids.clone().index_fill_(1, torch.arange(1), 64).fill_(64)[:1, :9])
