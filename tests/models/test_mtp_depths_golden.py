"""The depths alone, from NeMo AutoModel's backbone output and token ids, against AutoModel's hidden states."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtp_convert.models.mtp import MTPConfig
from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM
from mtp_convert.models.nemotron_v3.batch import Batch

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "automodel"


@pytest.mark.parametrize(
    "name", ["nemotron_d1", "nemotron_d2_rep", "nemotron_latent_groups", "nemotron_mtpM", "nemotron_packed"]
)
@torch.no_grad()
def test_depths_against_automodel(name: str) -> None:
    io = load_file(GOLDEN / name / "io.safetensors")
    config = MTPConfig(**json.loads((GOLDEN / name / "report.json").read_text())["mtp_config"])
    model = NemotronHForCausalLM.from_pretrained(
        GOLDEN / name,
        num_nextn_predict_layers=config.num_layers,
        mtp_use_repeated_layer=config.use_repeated_layer,
    )
    assert model.mtp_config == config
    assert model.mtp is not None
    length = io["input_ids"].shape[1]
    mask = io.get("attention_mask_4d", torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    outputs = model.mtp(
        io["last_hidden"],
        input_ids=io["input_ids"],
        embed_fn=model.get_input_embeddings(),
        batch=Batch(attention_mask=mask),
    )
    assert len(outputs) == config.num_layers
    for depth, found in enumerate(outputs):
        expected = io[f"mtp_per_depth_h.{depth}"]
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
