"""Golden folders of Nemotron-V3 and what the tests do with them."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import NemotronHConfig
from transformers.utils import logging

from mtp_convert.models.nemotron_v3 import (
    NemotronHCausalLMOutputWithPast,
    NemotronHForCausalLM,
    NemotronHybridCache,
    Numerics,
)

logging.set_verbosity_error()  # transformers recommends GPU kernels on every machine

FIXTURES = Path(__file__).parents[3] / "fixtures"
GOLDEN = FIXTURES / "golden" / "automodel"
D1, REPEATED, GROUPS = GOLDEN / "nemotron_d1", GOLDEN / "nemotron_d2_rep", GOLDEN / "nemotron_latent_groups"
MAMBA, PACKED = GOLDEN / "nemotron_mtpM", GOLDEN / "nemotron_packed"
TINY = FIXTURES / "tiny-nemotron-h"
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOLERANCE = 2e-5  # relative; rounding gives 1e-6, a mistake 1e-2 and more
OPTIONS: dict[Path, dict[str, Any]] = {REPEATED: {"num_nextn_predict_layers": 2, "mtp_use_repeated_layer": True}}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def golden(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "io.safetensors")


def config_of(folder: Path, **changes: object) -> NemotronHConfig:
    config = copy.deepcopy(NemotronHConfig.from_pretrained(folder))
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def load(folder: Path, **options: Any) -> NemotronHForCausalLM:  # noqa: ANN401
    """The folder's model in evaluation mode, with MTP running."""
    return copy.deepcopy(_loaded(folder, **(OPTIONS.get(folder, {}) | options)))


@cache
def _loaded(folder: Path, **options: Any) -> NemotronHForCausalLM:  # noqa: ANN401
    model = NemotronHForCausalLM.from_pretrained(folder, **options)
    model.compute_mtp_in_eval = True
    return model


def fresh(
    folder: Path = MAMBA, *, seed: int = 0, std: float = 0.2, numerics: Numerics | None = None, **changes: object
) -> NemotronHForCausalLM:
    """A model of the folder's config with `changes`, in which every parameter and router bias differs."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(config_of(folder, **changes), numerics=numerics)
    for tensor in model.state_dict().values():
        tensor.add_(std * torch.randn_like(tensor))
    model.compute_mtp_in_eval = True
    return model.eval()


def exchange(model: NemotronHForCausalLM, first: str, second: str) -> None:
    """Let two weights change places."""
    state = model.state_dict()
    kept = state[first].clone()
    state[first].copy_(state[second])
    state[second].copy_(kept)


def swap_halves(model: NemotronHForCausalLM, name: str) -> None:
    """Exchange the column halves of an `eh_proj` [H, 2H]."""
    weight = model.state_dict()[name]
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def some_ids(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Ids of 1 to 63: transformers takes the padding id 0 in a prompt for padding."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: NemotronHForCausalLM, *inputs: Tensor, **options: Any) -> NemotronHCausalLMOutputWithPast:  # noqa: ANN401
    output = model(*inputs, **options)
    assert isinstance(output, NemotronHCausalLMOutputWithPast)
    return output


def predictions(output: NemotronHCausalLMOutputWithPast) -> list[Tensor]:
    """Logits and the hidden state of every depth."""
    assert output.logits is not None
    assert output.mtp_per_depth_h is not None
    return [output.logits, *output.mtp_per_depth_h]


def left_padded(ids: Tensor) -> Tensor:
    """A mask that takes the first three tokens of row 0 for padding."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def filled(model: NemotronHForCausalLM, ids: Tensor, *, record: bool = False) -> NemotronHybridCache:
    cache = model.new_cache()
    run(model, ids, past_key_values=cache)
    if record:
        cache.activate_past_recording()
    return cache


def heldout(rows: int, length: int) -> Tensor:
    """Held-out text as ids [rows, length] of the trained fixture."""
    data = (FIXTURES / "text" / "heldout.txt").read_bytes()[: rows * length]
    return torch.tensor(list(data)).view(rows, length)


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))
