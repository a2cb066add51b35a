"""GPTModel and HybridModel against outputs, losses and files of megatron-core 0.19.2."""

from __future__ import annotations

import pytest
from _golden import (
    FEATURES,
    GPT,
    HYBRID,
    build,
    check_losses,
    differing,
    feature_errors,
    golden_config,
    golden_errors,
    golden_rank,
    loaded,
)


@pytest.mark.parametrize("name", [*GPT, *HYBRID])
def test_outputs_are_those_of_megatron_core(name: str) -> None:
    found = golden_errors(name)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", [*GPT, *HYBRID])
def test_losses_are_those_of_megatron_core(name: str) -> None:
    check_losses(name)


@pytest.mark.parametrize("name", [*GPT, "hyb_m"])
def test_mp_rank_files_load_by_name(name: str) -> None:
    model, state = build(golden_config(name)), golden_rank(name)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    assert differing(model, loaded(name)) == []


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_megatron_cores(name: str) -> None:
    found = feature_errors(name)
    assert max(found.values()) < 1e-5, found
