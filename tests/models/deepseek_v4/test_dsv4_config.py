"""What is read from the configs of DeepSeek-V4."""

import json
from pathlib import Path
from typing import Any

import pytest
from _dsv4 import D1, D2, raw_config
from transformers import DeepseekV4Config

from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM, read_config
from mtp_convert.models.deepseek_v4.config import attention_kinds, hash_layers

# The sizes that differ from the defaults, in the spelling of the releases.
RELEASED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize("folder", [D1, D2], ids=lambda folder: folder.name)
def test_automodel_config_means_the_same(folder: Path) -> None:
    ours = read_config(folder)
    theirs = read_config(json.loads((folder / "automodel_config.json").read_text()))
    assert attention_kinds(theirs) == attention_kinds(ours)
    assert hash_layers(theirs) == hash_layers(ours) == (0,)
    assert theirs.rope_parameters == ours.rope_parameters
    state = DeepseekV4ForCausalLM.from_config(theirs).state_dict()
    expected = DeepseekV4ForCausalLM.from_config(ours).state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize(("folder", "ratios"), [(D1, [0, 4, 16, 4, 0]), (D2, [0, 4, 16, 4, 4, 0])])
def test_ratios_reach_the_depths_and_survive_a_second_reading(folder: Path, ratios: list[int]) -> None:
    config = read_config(folder)
    assert [kind.ratio for kind in attention_kinds(config)] == ratios
    assert attention_kinds(read_config(config)) == attention_kinds(config)
    again = read_config(json.loads(config.to_json_string()))
    assert attention_kinds(again) == attention_kinds(config)


def test_a_released_config() -> None:
    config = read_config(RELEASED)
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    assert [(k.layer_type, k.ratio) for k in attention_kinds(config)] == [
        (names[ratio], ratio) for ratio in RELEASED["compress_ratios"]
    ]
    assert hash_layers(config) == (0, 1)


def test_a_config_of_transformers_needs_no_ratios() -> None:
    config = DeepseekV4Config(num_hidden_layers=4, num_nextn_predict_layers=2)
    assert [kind.ratio for kind in attention_kinds(read_config(config))] == [128, 128, 128, 4, 0, 0]
    assert attention_kinds(config) == attention_kinds(read_config(config))


def test_layers_may_pool_different_numbers_of_tokens() -> None:
    config = raw_config(D1, compress_ratios=[8, 4, 16, 0])
    del config["layer_types"]
    model = DeepseekV4ForCausalLM.from_config(config)
    shapes = [tuple(t.shape) for n, t in model.state_dict().items() if n.endswith("compressor.position_bias")]
    assert shapes == [(8, 16), (4, 32), (16, 16)]


@pytest.mark.parametrize(("asked", "depths"), [(None, 1), (0, 0), (3, 3)])
def test_the_number_of_depths_may_be_replaced(asked: int | None, depths: int) -> None:
    config = read_config(RELEASED, num_nextn_predict_layers=asked)
    assert config.num_nextn_predict_layers == depths
    assert [kind.ratio for kind in attention_kinds(config)[4:]] == [0] * depths


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"dspark_block_size": 4, "tie_word_embeddings": True}, ["block drafter", "tie_word_embeddings is true"]),
        ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers is -1"]),
        ({"compress_ratios": [0, -4]}, ["compress_ratios[1] is -4", "2 entries, expected one for each of 4 layers"]),
        (
            {"compress_ratios": [4, 8, 16, 0]},
            [
                "compress_ratios[0] is 4, but layer_types[0] is sliding_attention",
                "compress_ratios[1] is 8, but layer_types[1] is compressed_sparse_attention",
                "compress_ratios[3] is 0, but layer_types[3] is compressed_sparse_attention",
            ],
        ),
    ],
)
def test_all_contradictions_are_named_together(changes: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read_config(raw_config(D1, **changes))
    assert all(problem in str(caught.value) for problem in problems)
