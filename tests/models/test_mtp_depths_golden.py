"""The depths' hidden states against NeMo AutoModel's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mtp_convert.models.mtp import MTPConfig, MTPModule
from mtp_convert.models.nemotron_h import NemotronHWithMTP

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "automodel"


class ReleasedSublayer(nn.Module):
    """A released Nemotron-H block as a sub-layer; only attention wants the mask."""

    def __init__(self, block: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *, attention_mask: Tensor, embed_input: Tensor | None = None) -> Tensor:
        if embed_input is not None:
            x = self.block.eh_proj(torch.cat([self.block.enorm(embed_input), self.block.hnorm(x)], -1))
        x = self.block(x, attention_mask=attention_mask if self.block.block_type == "full_attention" else None)
        return self.block.final_layernorm(x) if hasattr(self.block, "final_layernorm") else x


@pytest.mark.parametrize(
    "name", ["nemotron_d1", "nemotron_d2_rep", "nemotron_latent_groups", "nemotron_mtpM", "nemotron_packed"]
)
@torch.no_grad()
def test_depths_against_automodel(name: str) -> None:
    """From AutoModel's backbone output and the released weights follows AutoModel's hidden state of every depth."""
    released = NemotronHWithMTP.from_folder(GOLDEN / name)
    io = load_file(GOLDEN / name / "io.safetensors")
    config = MTPConfig(**json.loads((GOLDEN / name / "report.json").read_text())["mtp_config"])
    mtp = MTPModule(
        config,
        list(config.layer_pattern),
        lambda global_idx, **_: ReleasedSublayer(released.mtp.layers[global_idx]),
    )
    length = io["input_ids"].shape[1]
    mask = io.get("attention_mask_4d", torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    outputs = mtp(
        io["last_hidden"], input_ids=io["input_ids"], embed_fn=released.backbone.embeddings, attention_mask=mask
    )
    assert len(outputs) == config.num_layers
    for depth, found in enumerate(outputs):
        expected = io[f"mtp_per_depth_h.{depth}"]
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
