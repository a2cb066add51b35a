"""The golden models in bfloat16, and on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from _golden import (
    GPT,
    HYBRID,
    LINEAR,
    MAMBA,
    build,
    errors,
    flat,
    golden_config,
    golden_outputs,
    golden_tensors,
    ids,
    loaded,
    settle,
    tiny,
)
from torch import Tensor

from mtp_convert.models.megatron.language_model import LanguageModel, Prediction
from mtp_convert.models.megatron.loading import load_tensors
from mtp_convert.models.megatron.packed import PackedSeqParams

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
NAMES = (*GPT, *HYBRID)


def predict(model: LanguageModel, tokens: Tensor, device: str) -> Prediction:
    with torch.no_grad():
        return model.to(device).predict(tokens.to(device))


def typical(got: Tensor, expected: Tensor) -> float:
    """Median over positions of the relative error: a near tie of a router makes single tokens wholly different."""
    return float(((got.cpu().float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name: str, device: str) -> None:
    model, outputs = build(golden_config(name, params_dtype=torch.bfloat16)), golden_outputs(name)
    load_tensors(model, golden_tensors(name))
    got = flat(predict(model, outputs["tokens"], device))
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    found = {n: typical(t, outputs[n]) for n, t in got.items()}
    assert max(found.values()) < 0.03, found


def test_bfloat16_models_keep_some_numbers_exact() -> None:
    model = build(golden_config("hyb_m", params_dtype=torch.bfloat16))
    state = {n: t.dtype for n, t in model.state_dict().items() if not n.endswith("_extra_state")}
    exact = {n.rsplit(".", 1)[-1] for n, dtype in state.items() if dtype == torch.float32}
    assert exact == {"A_log", "D", "expert_bias"}
    assert set(state.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", NAMES)
def test_float32_on_a_device(name: str, device: str) -> None:
    found = errors(predict(loaded(name), golden_outputs(name)["tokens"], device), golden_outputs(name))
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_training_and_packing_on_a_device(device: str) -> None:
    """Gradients of packed rows through every kind of block equal the CPU's."""
    changes = {**MAMBA, **LINEAR, "position_embedding_type": "rope"}
    config = tiny(**changes, num_layers=4, hybrid_layer_pattern="M*G-/M*/M*")
    grads = []
    for place in ("cpu", device):
        model, row = settle(build(config)).train().to(place), ids(12, rows=1).to(place)
        ends = torch.tensor([0, 5, 12], device=place)
        model(row, labels=row, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)).sum().backward()
        grads.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-9, msg=name)
