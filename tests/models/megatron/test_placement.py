"""Where layers and ranks lie, against tables made by megatron-core 0.19.2."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtp_convert.models.megatron.groups import (
    Member,
    ParallelSizes,
    ProcessGroupCollection,
    current_groups,
    use_groups,
)
from mtp_convert.models.megatron.placement import (
    LayerType,
    PipelineParallelLayerLayout,
    get_mtp_layer_offset,
    get_mtp_num_layers_to_build,
    get_mtp_ranks,
    mtp_on_this_rank,
)

DATA = Path(__file__).parent / "data"
PLACEMENT = json.loads((DATA / "placement.json").read_text())
RANKS = json.loads((DATA / "ranks.json").read_text())["cases"]
WITH_LAYOUT = [c for c in PLACEMENT["cases"] if c["layout"]]


@dataclass(frozen=True)
class Config:
    mtp_num_layers: int | None = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    pipeline_model_parallel_layout: PipelineParallelLayerLayout | str | None = None


def config_of(case: dict[str, Any]) -> Config:
    return Config(case["mtp"], case["pp"], case.get("vp"), case["layout"])


def label(case: dict[str, Any]) -> str:
    return f"{case['layout']} pp{case['pp']}"


@pytest.mark.parametrize("case", PLACEMENT["cases"], ids=label)
def test_mtp_layers_lie_where_megatron_core_puts_them(case: dict[str, Any]) -> None:
    config = config_of(case)
    layout = case["layout"] and PipelineParallelLayerLayout.from_str(case["layout"], case["pp"])
    vp_size = layout.virtual_pipeline_model_parallel_size if layout else case["vp"]
    for pp_rank, vp_stage, layers, offset, on_rank, on_stage, *_ in case["stages"]:
        with use_groups(ProcessGroupCollection(pp=Member(pp_rank, case["pp"]), vp_size=vp_size)):
            assert get_mtp_num_layers_to_build(config, vp_stage) == layers
            assert get_mtp_layer_offset(config, vp_stage) == offset
            assert mtp_on_this_rank(layout, case["mtp"], True, vp_stage) is on_rank
            assert mtp_on_this_rank(layout, case["mtp"], False, vp_stage) is on_stage
        assert get_mtp_num_layers_to_build(config, vp_stage, pp_rank) == layers
    assert get_mtp_ranks(range(100, 100 + case["pp"]), config) == case["mtp_ranks"]


@pytest.mark.parametrize("case", WITH_LAYOUT, ids=label)
def test_layouts_are_read_as_megatron_core_reads_them(case: dict[str, Any]) -> None:
    layout = PipelineParallelLayerLayout.from_str(case["layout"], case["pp"])
    assert layout.validate_layer_layout(case["num_layers"], case["mtp"]) is case["standalone"]
    if case["names"]:
        assert [kind.name for kind in layout.flatten_layout] == case["names"]
    for pp_rank, vp_stage, *_, layers, offset in case["stages"]:
        numbers = layout.get_layer_id_list(LayerType.decoder, vp_stage, pp_rank)
        assert numbers == list(range(offset, offset + layers))


def test_a_layout_given_as_lists() -> None:
    stages = [["embedding", " Decoder"], [LayerType.decoder, "mtp", "loss"]]
    layout = PipelineParallelLayerLayout.from_stages(stages, 2)
    assert layout == PipelineParallelLayerLayout.from_str("Et|tmL", 2)


@pytest.mark.parametrize(
    ("layout", "same"),
    [("E (t t|)*2, L", "Ett|tt|L"), ("E((tt|)*2t|)*2L", "Ett|tt|t|tt|tt|t|L"), ("E(|t)*2|*2L", "E|t|t||L")],
)
def test_repetition_in_layouts(layout: str, same: str) -> None:
    stages = same.count("|") + 1
    read = PipelineParallelLayerLayout.from_str(layout, stages)
    assert read == PipelineParallelLayerLayout.from_str(same, stages)
    assert len(read.layout) == stages


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        ("Etx", 1, "'x' is out of place"),
        ("E*", 1, r"'\*' is out of place"),
        ("*2E", 1, r"'\*' is out of place"),
        ("E)t", 1, r"'\)' is out of place"),
        ("E(t|", 1, "not closed"),
        ("Et|t|L", 2, "3 stages do not divide among 2"),
        ("EtL", 0, "1 stages do not divide among 0"),
    ],
)
def test_layouts_that_cannot_be_read(layout: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineParallelLayerLayout.from_str(layout, size)


def test_unknown_layer_names_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"\['head', 'tail'\].*known are \['embedding'"):
        PipelineParallelLayerLayout.from_stages([["tail", "loss"], ["head"]], 1)


# megatron-core 0.19.2 refuses every one of these too, at the first thing wrong
@pytest.mark.parametrize(
    ("layout", "size", "layers", "mtp", "messages"),
    [
        ("Et|tm|tL", 3, 3, 1, ["decoder layers behind MTP"]),
        ("tEtL", 1, 2, 0, ["first layer must be the embedding"]),
        ("Ett", 1, 2, 0, ["the last the loss", "0 loss layers, expected 1"]),
        ("EttL", 1, 3, 0, ["2 decoder layers, expected 3"]),
        ("EEtmL", 1, 1, None, ["2 embedding layers, expected 1", "1 mtp layers, expected 0"]),
        ("Et|tm|tmL", 3, 2, 2, ["decoder layers behind MTP", "3 decoder", "in 2 stages, expected one"]),
        ("Et|tm|m|L", 2, 2, 2, ["in 2 stages", "before the last virtual stage"]),
    ],
)
def test_layouts_that_cannot_run(layout: str, size: int, layers: int, mtp: int | None, messages: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        PipelineParallelLayerLayout.from_str(layout, size).validate_layer_layout(layers, mtp)
    assert all(message in str(refusal.value) for message in messages), refusal.value
    assert str(refusal.value).count(";") == len(messages) - 1


def test_encoder_layers_are_refused() -> None:
    layout = PipelineParallelLayerLayout.from_stages([["embedding", "encoder", "decoder", "loss"]], 1)
    with pytest.raises(ValueError, match="1 encoder layers, expected 0"):
        layout.validate_layer_layout(1, None)


def test_stages_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pipeline ranks, this process is in a pipeline group of 1"):
        get_mtp_num_layers_to_build(Config(pipeline_model_parallel_size=4))
    with pytest.raises(ValueError, match="pp_rank must be 0 to 3, got 4"):
        get_mtp_num_layers_to_build(Config(pipeline_model_parallel_size=4), pp_rank=4)
    with pytest.raises(ValueError, match="vp_stage must be 0 to 1 with 2 virtual pipeline stages, got None"):
        get_mtp_num_layers_to_build(Config(virtual_pipeline_model_parallel_size=2))
    with pytest.raises(ValueError, match="1 of 2 MTP layers on one stage"):
        get_mtp_num_layers_to_build(Config(2, 2, None, "Etm|mL"), pp_rank=1)


@pytest.mark.parametrize("case", RANKS, ids=lambda c: str(c["sizes"]))
def test_ranks_lie_in_groups_as_in_megatron_core(case: dict[str, Any]) -> None:
    sizes = ParallelSizes(**case["sizes"])
    for name, members in case["groups"].items():
        groups = [getattr(sizes.at(rank), name) for rank in range(sizes.world)]
        assert [[group.rank(), group.size()] for group in groups] == members, name
    assert len(case["groups"]) == 8


def test_experts_are_cut_like_dense_layers_unless_told_otherwise() -> None:
    assert ParallelSizes(tp=2, dp=2, ep=2).at(3) == ParallelSizes(tp=2, dp=2, ep=2, etp=2).at(3)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="start at 1, got tp=0, vp=-1"):
        ParallelSizes(tp=0, vp=-1)
    with pytest.raises(ValueError, match=r"etp \* ep = 6 does not divide the 4 processes"):
        ParallelSizes(tp=2, dp=2, ep=3)
    with pytest.raises(ValueError, match="rank 4 is outside a group of 4"):
        ParallelSizes(tp=2, pp=2).at(4)


def test_groups_hold_inside_their_block_alone() -> None:
    outer, inner = ParallelSizes(tp=2).at(1), ParallelSizes(pp=3).at(2)
    with use_groups(outer):
        with suppress(KeyError), use_groups(inner):
            assert current_groups() is inner
            raise KeyError
        assert current_groups() is outer
    assert current_groups() == ProcessGroupCollection()
