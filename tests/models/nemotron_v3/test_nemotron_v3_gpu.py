"""The same checks on a CUDA device, with whatever kernels are installed there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from _nemotron_v3 import (
    D1,
    GROUPS,
    MAMBA,
    PACKED,
    REPEATED,
    TINY,
    fresh,
    golden,
    heldout,
    load,
    relative,
    run,
    some_ids,
)
from torch import Tensor
from transformers import NemotronHForCausalLM as TransformersModel

from mtp_convert.models.nemotron_v3 import BackendConfig, NemotronHForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Kernels of other packages warn about what they will change.
    pytest.mark.filterwarnings("ignore::UserWarning:mamba_ssm.*", "ignore::FutureWarning:mamba_ssm.*"),
]
FOLDERS = [D1, REPEATED, GROUPS, MAMBA, PACKED]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Relative. In float32 kernels may multiply in TF32; in bfloat16 a near tie of the router changes single tokens.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}


def moved(folder: Path, dtype: torch.dtype = torch.float32) -> NemotronHForCausalLM:
    # Grouped matrix products want rows of 16 bytes, which these small models do not have in every type.
    return load(folder, dtype=dtype, backend=BackendConfig(experts="eager")).cuda()


def typical(actual: Tensor, expected: Tensor) -> float:
    """Median over positions of the relative error: a token whose expert changed does not count."""
    error = (actual.float() - expected.float()).abs().amax(-1) / expected.float().abs().max()
    return float(error.median())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_outputs_equal_automodel(folder: Path, dtype: torch.dtype) -> None:
    expected = {name: t.cuda() for name, t in golden(folder).items()}
    packed = {"seq_idx": expected["seq_idx"]} if "seq_idx" in expected else {}
    real = expected["seq_idx"] != 0 if packed else torch.ones_like(expected["input_ids"], dtype=torch.bool)
    output = run(moved(folder, dtype), expected["input_ids"], **packed)
    assert output.mtp_per_depth_h is not None
    measure = relative if dtype == torch.float32 else typical
    assert measure(output.logits[real], expected["logits"][real]) < TOLERANCE[dtype]
    for k, hidden in enumerate(output.mtp_per_depth_h):
        assert measure(hidden[real], expected[f"mtp_per_depth_h.{k}"][real]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_backbone_equals_transformers(dtype: torch.dtype) -> None:
    ids = heldout(2, 64).cuda()
    theirs = TransformersModel.from_pretrained(TINY, dtype=dtype).cuda()
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    assert typical(run(load(TINY, dtype=dtype).cuda(), ids).logits, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("training", [False, True])
def test_documents_are_kept_apart(training: bool) -> None:
    model, ids = moved(MAMBA).train(training), some_ids(1, 19).cuda()
    lengths = (5, 1, 11, 2)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0).cuda()
    expected = torch.cat([run(model, piece).logits for piece in ids.split(lengths, dim=1)], dim=1)
    assert relative(run(model, ids, seq_idx=seq_idx).logits, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("folder", [D1, MAMBA], ids=lambda folder: folder.name)
def test_prefill_and_decoding_equal_one_forward_pass(folder: Path) -> None:
    model, ids = moved(folder), some_ids(2, 16).cuda()
    expected, cache = run(model, ids).logits, model.new_cache()
    pieces = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
    found = torch.cat([run(model, piece, past_key_values=cache).logits for piece in pieces], dim=1)
    assert relative(found, expected) < TOLERANCE[torch.float32]


def test_drafting_gives_the_tokens_of_greedy_decoding() -> None:
    model, ids = load(TINY, dtype=torch.float32).cuda(), heldout(1, 96).cuda()
    out = model.generate_speculative(ids, max_new_tokens=40, **GREEDY)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=40, **GREEDY))
    assert out.acceptance[0] > 0.6


def test_gradients_equal_those_of_the_cpu() -> None:
    ids = some_ids(2, 9)
    gradients = []
    for device in ("cpu", "cuda"):
        model = fresh(D1, std=0.1).train().to(device)
        output = model(ids.to(device), labels=ids.to(device))
        (output.loss + output.mtp_per_depth_h[0].square().mean()).backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 10 * TOLERANCE[torch.float32], name
