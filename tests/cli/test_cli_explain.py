"""`explain`: one tensor in every layout, exact against a checkpoint, open-numbered against a family."""

from __future__ import annotations

import pytest
from _kit import AUTOMODEL, MEGATRON, Cli

V3 = ("--hf-config", MEGATRON / "dsv3_te" / "config.json")
V3_CKPT = MEGATRON / "dsv3_te" / "ckpt"


def names(found: dict[str, object], layout: str) -> list[str]:
    rows = found["names"]
    assert isinstance(rows, list)
    return [row["tensor"] for row in rows if row["layout"] == layout]


def test_a_fused_tensor_of_a_checkpoint(cli: Cli) -> None:
    key = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    found = cli("explain", key, V3_CKPT, *V3, "--format", "json").data
    assert found["params"] == ["layers.1.mlp.shared.gate", "layers.1.mlp.shared.up"]
    module = "model.layers.1.mlp.shared_experts"
    assert names(found, "hf") == [f"{module}.gate_proj.weight", f"{module}.up_proj.weight"]


def test_a_name_of_another_layout_than_the_checkpoint(cli: Cli) -> None:
    found = cli("explain", "model.layers.4.shared_head.norm.weight", V3_CKPT, *V3, "--format", "json").data
    assert found["layout"] == "hf"
    assert names(found, "megatron") == ["mtp.layers.0.final_layernorm.weight"]


def test_a_copy(cli: Cli) -> None:
    found = cli("explain", "mtp.0.head.weight", AUTOMODEL / "dsv4_d1", "--format", "json").data
    assert found["copy_of"] == "head"


def test_a_variant_is_another_name(cli: Cli) -> None:
    found = cli("explain", "layers.1.attn.attn_sink", AUTOMODEL / "dsv4_d1", "--format", "json").data
    assert names(found, "native (automodel)") == ["model.layers.1.self_attn.sinks_param.weight"]


@pytest.mark.parametrize("number", [3, 60])
def test_numbers_are_open_without_a_checkpoint(number: int, cli: Cli) -> None:
    found = cli("explain", f"model.layers.{number}.self_attn.kv_b_proj.weight", "--format", "json").data
    assert found["family"] == "deepseek_v3"
    assert names(found, "megatron") == ["decoder.layers.#.self_attention.linear_kv_up_proj.weight"]


def test_near_misses(cli: Cli) -> None:
    done = cli("explain", "layers.1.attn.wq_c.weight", "--family", "deepseek_v4")
    assert done.code == 4
    assert "layers.#.attn.wq_a.weight" in done.err


def test_unknown_family(cli: Cli) -> None:
    done = cli("explain", "lm_head.weight", "--family", "bert")
    assert done.code == 4
    assert "nemotron_h" in done.err


def test_people_read_it(cli: Cli) -> None:
    done = cli("explain", "mtp.layers.0.eh_proj.weight", "--family", "nemotron_h")
    assert done.code == 0
    assert "mtp.layers.#.eh_proj.weight [128, 256]" in done.out
