"""Golden folders of DeepSeek-V4 and what the tests do with them."""

import copy
import functools
import json
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from mtp_convert.models.deepseek_v4 import DeepseekV4CausalLMOutput, DeepseekV4ForCausalLM
from mtp_convert.models.deepseek_v4.model import ModelOptions

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden" / "automodel"
D1, D2, PAD = GOLDEN / "dsv4_d1", GOLDEN / "dsv4_mtpratio4", GOLDEN / "dsv4_pad"
TOLERANCE = 2e-5  # relative; rounding gives 1e-6, the mildest mistake in the tests 1e-2


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def golden(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "io.safetensors")


def raw_config(folder: Path, **changes: object) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changes}


_load = functools.cache(DeepseekV4ForCausalLM.from_pretrained)


def training(folder: Path, **options: Unpack[ModelOptions]) -> DeepseekV4ForCausalLM:
    """The folder's model with MTP running, the test's own."""
    return copy.deepcopy(_load(folder, **options)).train()


def without_ties(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """Let every query see all its compressed entries.

    Tiny indexers score many entries exactly 0, and which of them `torch.topk` picks depends on how many there are.
    """
    for module in model.modules():
        if isinstance(module, DeepseekV4Indexer):
            module.index_topk = 10**6
    return model


def scrambled(config: dict[str, Any], **options: Unpack[ModelOptions]) -> DeepseekV4ForCausalLM:
    """A model of this config in which every parameter and router bias differs, norms from one too."""
    model = DeepseekV4ForCausalLM.from_config(config, **options)
    draw = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw))
        elif name.endswith("tid2eid"):
            experts = model.config.n_routed_experts
            tensor.copy_(torch.rand(len(tensor), experts, generator=draw).topk(tensor.shape[1]).indices)
    return model


@torch.no_grad()
def run(model: DeepseekV4ForCausalLM, *inputs: Tensor, **options: object) -> DeepseekV4CausalLMOutput:
    output = model(*inputs, **options)  # type: ignore[arg-type]
    assert isinstance(output, DeepseekV4CausalLMOutput)
    return output


def predictions(output: DeepseekV4CausalLMOutput) -> list[Tensor]:
    """Logits and the hidden state of every depth."""
    assert output.mtp_per_depth_h is not None
    return [output.logits, *output.mtp_per_depth_h]
