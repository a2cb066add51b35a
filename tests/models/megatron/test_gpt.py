"""GPTModel: wrong tensors, pipeline stages, packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _golden import (
    EXPERTS,
    LINEAR,
    Tensors,
    build,
    check_packed,
    golden_errors,
    golden_tensors,
    ids,
    settle,
    tiny,
)
from torch import Tensor

from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.groups import ParallelSizes, use_groups
from mtp_convert.models.megatron.loading import load_tensors, state_from_tensors, tensors_from_ranks
from mtp_convert.models.megatron.placement import PipelineParallelLayerLayout

LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 4},
    "experts": {"num_layers": 4, **EXPERTS, "moe_layer_freq": (0, 1, 0, 1)},
    "latent": {"num_layers": 4, **LATENT},
    "linear": {"num_layers": 4, **LINEAR, "linear_attention_freq": 2},
}


def swap_halves(weight: Tensor) -> Tensor:
    return weight.roll(weight.shape[-1] // 2, -1)


def swap_keys_and_values(weight: Tensor) -> Tensor:
    """linear_qkv of 4 layers, 2 groups of 2 queries, heads of 8."""
    rows = torch.unflatten(weight, -2, (2, 4, 8))
    return rows[..., [0, 1, 3, 2], :, :].flatten(-4, -2)


def swap_gate_and_up(weight: Tensor) -> Tensor:
    return weight.roll(weight.shape[-2] // 2, -2)


MUTANTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "halves of eh_proj": ("mtp.layers.0.eh_proj.weight", swap_halves),
    "keys and values": ("decoder.layers.self_attention.linear_qkv.weight", swap_keys_and_values),
    "gate and up": ("decoder.layers.mlp.linear_fc1.weight", swap_gate_and_up),
    "a norm of MTP": ("mtp.layers.1.final_layernorm.weight", lambda weight: weight.roll(1)),
    "order of the layers": ("decoder.layers.mlp.linear_fc2.weight", lambda weight: weight.flip(0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_tensor_is_noticed(mutant: str) -> None:
    key, change = MUTANTS[mutant]
    found = golden_errors("qwen2_te", **{key: change(golden_tensors("qwen2_te")[key])})
    assert max(found.values()) > 0.02, found


# --- pipeline stages, by hand in one process ------------------------------------------------------


def run_stages(sizes: ParallelSizes, tensors: Tensors, tokens: Tensor, **changes: Any) -> Tensor:  # noqa: ANN401
    """Logits of a model cut into stages, each loaded by itself, each getting the output of the one before."""
    virtual = sizes.vp or 1
    config = tiny(
        **{
            "pipeline_model_parallel_size": sizes.pp,
            "virtual_pipeline_model_parallel_size": sizes.vp,
            **changes,
        }
    )
    passed: Tensor | None = None
    for number in range(sizes.pp * virtual):
        stage, rank = divmod(number, sizes.pp)
        with use_groups(sizes.at(rank)):
            part = build(config, vp_stage=stage if sizes.vp else None)
            load_tensors(part, tensors)
            part.set_input_tensor(passed)
            with torch.no_grad():
                passed = part(tokens)
    assert passed is not None
    return passed


@pytest.mark.parametrize("sizes", [ParallelSizes(pp=2), ParallelSizes(pp=4), ParallelSizes(pp=2, vp=2)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_stages_compute_the_same_bit_for_bit(model: str, sizes: ParallelSizes) -> None:
    whole = settle(build(tiny(**MODELS[model])))
    with torch.no_grad():
        expected = whole(ids())
    tensors = tensors_from_ranks([whole.sharded_state_dict()])
    assert torch.equal(run_stages(sizes, tensors, ids(), **MODELS[model]), expected)


def test_stages_pass_mtp_hidden_states_on() -> None:
    """MTP layers on a stage of their own, before the loss: the last stage makes the MTP loss from what it gets."""
    whole = settle(build(tiny(num_layers=3)))
    tensors = tensors_from_ranks([whole.sharded_state_dict()])
    layout = PipelineParallelLayerLayout.from_str("Ett|tmm|L", 3)
    config = tiny(num_layers=3, pipeline_model_parallel_size=3, pipeline_model_parallel_layout=layout)
    passed, sizes = None, ParallelSizes(pp=3)
    for rank in range(3):
        part = build(config, sizes.at(rank))
        load_tensors(part, tensors)
        part.set_input_tensor(passed)
        with torch.no_grad():
            passed = part.hidden_states(ids())
    assert part.post_process
    assert not part.mtp_process
    with torch.no_grad():
        assert torch.equal(passed, whole.hidden_states(ids()))
        assert torch.equal(part(ids()), whole(ids()))


def test_layers_are_numbered_from_zero_on_every_stage() -> None:
    config, sizes = tiny(num_layers=4, pipeline_model_parallel_size=2), ParallelSizes(pp=2)
    first, last = (build(config, sizes.at(rank)) for rank in range(2))
    assert [len(stage.decoder.layers) for stage in (first, last)] == [2, 2]
    assert [layer.layer_number for layer in last.decoder.layers] == [3, 4]
    names = set(last.state_dict())
    assert "embedding.word_embeddings.weight" in names
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names
    assert "decoder.final_layernorm.weight" in names
    assert not any(n.startswith(("mtp.", "output_layer", "decoder.final")) for n in first.state_dict())
    copy = last.sharded_state_dict()["embedding.word_embeddings.weight"]
    assert copy.replica_id == (1, 0, 0)


@pytest.mark.parametrize(("first", "last", "expected"), [(1, 2, [1, 2]), (None, 1, [2, 1]), (1, None, [1, 2])], ids=str)
def test_stages_may_be_uneven(first: int | None, last: int | None, expected: list[int]) -> None:
    config = tiny(
        num_layers=3,
        pipeline_model_parallel_size=2,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    parts = [build(config, ParallelSizes(pp=2).at(rank)) for rank in range(2)]
    assert [len(part.decoder.layers) for part in parts] == expected


# --- packed sequences -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_packed_sequences_do_not_see_each_other(model: str) -> None:
    whole = settle(build(tiny(**MODELS[model])))
    check_packed(whole)


def test_a_mask_hides_further_keys() -> None:
    whole = settle(build(tiny()))
    tokens, changed = ids(), ids().clone()
    changed[:, 2] = (changed[:, 2] + 1) % 32
    hidden = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hidden[..., 3:, 2] = True
    with torch.no_grad():
        kept = [whole(t, attention_mask=hidden)[:, 3:] for t in (tokens, changed)]
        free = [whole(t)[:, 3:] for t in (tokens, changed)]
    assert torch.equal(*kept)
    assert not torch.equal(*free)


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_experts_in_one_module_are_those_one_by_one(biases: bool) -> None:
    """Both forms have the same keys, so a checkpoint of one loads into the other and computes the same."""
    changes = {**EXPERTS, "moe_shared_expert_intermediate_size": None, "add_bias_linear": biases}
    grouped, single = (build(tiny(**changes, moe_grouped_gemm=g)) for g in (True, False))
    assert any("weight3" in n for n in grouped.state_dict())
    assert any("local_experts.3" in n for n in single.state_dict())
    load_tensors(single, tensors_from_ranks([settle(grouped).sharded_state_dict()]))
    with torch.no_grad():
        torch.testing.assert_close(single(ids()), grouped(ids()), rtol=1e-12, atol=1e-12)


# --- refusals -------------------------------------------------------------------------------------


def test_models_run_on_whole_tensors_alone() -> None:
    with pytest.raises(ValueError, match="tensor 2, context 2"):
        build(tiny(), ParallelSizes(tp=2, cp=2).at(1))(ids())


def test_a_stage_needs_its_input() -> None:
    part = build(tiny(pipeline_model_parallel_size=2), ParallelSizes(pp=2).at(1))
    with pytest.raises(ValueError, match="set_input_tensor"):
        part(ids())
    with pytest.raises(ValueError, match="cannot predict"):
        part.predict(ids())


def test_the_groups_must_be_those_of_the_config() -> None:
    with pytest.raises(ValueError, match="the model has 1 pipeline ranks, the group 2"):
        build(tiny(), ParallelSizes(pp=2).at(0))


def test_layers_must_divide_among_stages() -> None:
    with pytest.raises(ValueError, match="3 decoder layers do not divide among 2 pipeline ranks"):
        build(tiny(num_layers=3, pipeline_model_parallel_size=2), ParallelSizes(pp=2).at(0))


def test_a_pattern_makes_no_gpt_model() -> None:
    with pytest.raises(ValueError, match="hybrid model"):
        GPTModel(tiny(num_layers=1, mtp_num_layers=None, hybrid_layer_pattern="*"))


def test_a_stage_takes_its_part_of_a_checkpoint() -> None:
    config, sizes = tiny(num_layers=4, pipeline_model_parallel_size=2), ParallelSizes(pp=2)
    tensors = tensors_from_ranks([build(tiny(num_layers=4)).sharded_state_dict()])
    state = state_from_tensors(build(config, sizes.at(1)), tensors)
    stacked = tensors["decoder.layers.mlp.linear_fc2.weight"]
    assert torch.equal(state["decoder.layers.0.mlp.linear_fc2.weight"], stacked[2])
