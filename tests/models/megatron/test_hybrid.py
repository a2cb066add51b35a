"""HybridModel: files of several ranks, wrong tensors, pipeline stages, packed sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _golden import (
    EXPERTS,
    LINEAR,
    MAMBA,
    build,
    check_packed,
    flat,
    golden_config,
    golden_errors,
    golden_rank,
    golden_tensors,
    ids,
    settle,
    tiny,
)

from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.groups import ParallelSizes
from mtp_convert.models.megatron.hybrid_model import HybridModel
from mtp_convert.models.megatron.hybrid_pattern import HybridPattern
from mtp_convert.models.megatron.loading import load_tensors, tensors_from_ranks

SETTINGS = {**EXPERTS, **MAMBA, **LINEAR, "num_layers": 4, "position_embedding_type": "none"}
PATTERN = "M*E-/GM*/GM*"


def hybrid(pattern: str = PATTERN, **changes: object) -> TransformerConfig:
    return tiny(**{**SETTINGS, "hybrid_layer_pattern": pattern, **changes})


def test_mp_rank_files_of_two_tensor_ranks_make_the_model() -> None:
    sizes, ranks = ParallelSizes(tp=2), []
    for rank in range(2):
        part = build(golden_config("hyb_m"), sizes.at(rank))
        part.load_state_dict(golden_rank("hyb_m", "legacy_tp2", f"mp_rank_{rank:02d}"), strict=True)
        ranks.append(part.sharded_state_dict())
    tensors, expected = tensors_from_ranks(ranks), golden_tensors("hyb_m")
    assert tensors.keys() == expected.keys()
    assert [n for n, t in tensors.items() if not torch.equal(t, expected[n])] == []


@pytest.mark.parametrize(
    ("leaf", "change"), [("in_proj.weight.dt", 1.1), ("conv1d.weight.B", 1.1), ("mixer.A_log", 0.9)], ids=str
)
def test_a_wrong_mamba_tensor_is_noticed(leaf: str, change: float) -> None:
    changed = {n: t * change for n, t in golden_tensors("hyb_m").items() if n.endswith(leaf)}
    found = golden_errors("hyb_m", **changed)
    assert min(found.values()) > 1e-4, found


def test_the_inner_norm_of_mamba_keeps_its_own_epsilon() -> None:
    """Its parts are small enough that an epsilon of 1e-3 in every other norm would show there too."""
    small, usual = (settle(build(hybrid("M", num_layers=1, mtp_num_layers=None, layernorm_epsilon=e))) for e in (0, 1))
    x = torch.randn(4, 1, small.decoder.layers[0].mixer.d_inner, dtype=torch.float64) * 1e-3
    norms = [model.decoder.layers[0].mixer.norm for model in (small, usual)]
    assert torch.equal(norms[0](x), norms[1](x))
    assert not torch.equal(small.decoder.final_norm(x[..., :16]), usual.decoder.final_norm(x[..., :16]))


@pytest.mark.parametrize("pattern", ["M*|E-/GM*/GM*", "M|*E-/GM*/GM*", PATTERN])
def test_stages_compute_the_same_bit_for_bit(pattern: str) -> None:
    whole = settle(build(hybrid()))
    tensors = tensors_from_ranks([whole.sharded_state_dict()])
    with torch.no_grad():
        expected = whole(ids())
    passed = None
    for rank in range(2):
        part = build(hybrid(pattern, pipeline_model_parallel_size=2), ParallelSizes(pp=2).at(rank))
        load_tensors(part, tensors)
        part.set_input_tensor(passed)
        with torch.no_grad():
            passed = part(ids())
    assert torch.equal(passed, expected)


def test_packed_sequences_do_not_see_each_other() -> None:
    whole = settle(build(hybrid()))
    check_packed(whole)


def test_the_future_is_not_seen() -> None:
    whole = settle(build(hybrid()))
    tokens, changed = ids(), ids().clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    with torch.no_grad():
        before, after = (flat(whole.predict(t)) for t in (tokens, changed))
    # Depth d looks d + 1 tokens ahead.
    for name, seen in (("logits", 5), ("logits_mtp0", 4), ("logits_mtp1", 3)):
        assert torch.equal(before[name][:, :seen], after[name][:, :seen])
        assert not torch.equal(before[name][:, seen], after[name][:, seen])


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("MX", "unknown symbols"),
        ("M*/E/M", "MTP depths differ"),
        ("*+", "attention and latent attention"),
        ("/M", "no main layers"),
    ],
)
def test_wrong_patterns_are_refused(pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        HybridPattern.parse(pattern)


def test_stages_of_the_pattern_must_be_those_of_the_job() -> None:
    with pytest.raises(ValueError, match="2 stages, the job 1"):
        build(hybrid("M*|E-/GM*/GM*"))


def test_a_gpt_config_makes_no_hybrid_model() -> None:
    with pytest.raises(ValueError, match="hybrid_layer_pattern"):
        HybridModel(replace(tiny(), num_layers=2))
