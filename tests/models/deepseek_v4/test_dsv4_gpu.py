"""DeepSeek-V4 on a CUDA device, against the same weights on the CPU."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from _dsv4 import D2, PAD, golden, predictions, relative, run, training, without_ties
from transformers import DeepseekV4ForCausalLM as TransformersModel

from mtp_convert.models.deepseek_v4 import BackendConfig, DeepseekV4ForCausalLM, MoEConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = 1e-4  # float32 without TF32 (PyTorch's default), relative


@pytest.mark.parametrize("folder", [D2, PAD], ids=lambda folder: folder.name)
def test_float32_equals_the_cpu(folder: Path) -> None:
    given = golden(folder)
    ids, mask = given["input_ids"], given.get("attention_mask")
    model = without_ties(training(folder, moe_config=MoEConfig.automodel()))
    expected = predictions(run(model, ids, attention_mask=mask))
    output = run(model.cuda(), ids.cuda(), attention_mask=None if mask is None else mask.cuda())
    for ours, theirs in zip(predictions(output), expected, strict=True):
        assert relative(ours.cpu(), theirs) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backbone_equals_transformers(dtype: torch.dtype) -> None:
    ids = golden(D2)["input_ids"].cuda()
    theirs = TransformersModel.from_pretrained(D2, dtype=dtype).cuda()
    ours = DeepseekV4ForCausalLM.from_pretrained(D2, dtype=dtype).cuda()
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    # The eager experts add up with atomics, in no fixed order: a bfloat16 sum may round to the neighbour.
    assert relative(run(ours, ids).logits.float(), expected.float()) < (TOLERANCE if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_bfloat16_trains(experts: Literal["eager", "grouped_mm"]) -> None:
    backend = BackendConfig(experts=experts, float32_head=True, float32_compressor=True)
    model = training(D2, dtype=torch.bfloat16, backend=backend).cuda()
    ids = golden(D2)["input_ids"].cuda()
    output = model(ids, labels=ids)
    (output.loss + sum(h.float().square().mean() for h in output.mtp_per_depth_h)).backward()
    assert model.get_parameter("mtp.layers.0.attn_hc.fn").dtype == torch.float32
    for name, parameter in model.named_parameters():
        if ".indexer." not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    model = without_ties(training(D2, dtype=dtype)).cuda()
    ids = golden(D2)["input_ids"].cuda()
    seq_idx = torch.arange(37, device="cuda").ge(13).long().expand(2, -1)
    edited = torch.where(seq_idx == 0, (ids + 1) % 64, ids)
    before, after = (predictions(run(model, given, seq_idx=seq_idx)) for given in (ids, edited))
    for one, other in zip(before, after, strict=True):
        # A leak moves single features by 0.1 and more of the largest; a router near a tie may do so too in bfloat16.
        moved = (one - other)[:, 13:].float().abs().mean() / other.float().abs().mean()
        assert moved < (1e-4 if dtype == torch.float32 else 0.05)


def test_stages_equal_the_whole_model() -> None:
    model = training(D2).cuda()
    ids = golden(D2)["input_ids"].cuda()
    layers = [f"model.layers.{i}" for i in range(4)]
    names = [["model.embed_tokens", *layers[:2]], [*layers[2:], "model.norm", "lm_head"]]
    first, last = (model.pipeline_stage(stage) for stage in model.customize_pipeline_stage_modules(names))
    with torch.no_grad():
        outputs = last(*first(ids))
    for one, other in zip(outputs, predictions(run(model, ids)), strict=True):
        assert relative(one, other) < TOLERANCE
