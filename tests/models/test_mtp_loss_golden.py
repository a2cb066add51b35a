"""The MTP loss against NeMo AutoModel's figures."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _loss_kit import Model, plain_losses
from safetensors.torch import load_file
from torch import Tensor, nn

from mtp_convert.models.losses import MaskedCrossEntropy, calculate_loss
from mtp_convert.models.mtp import MTPConfig
from mtp_convert.models.mtp_loss import MTPLossConfig, calculate_mtp_loss

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "automodel"
FOLDERS = [
    "dsv4_d1",
    "dsv4_mtpratio4",
    "dsv4_pad",
    "nemotron_d1",
    "nemotron_d2_rep",
    "nemotron_latent_groups",
    "nemotron_mtpM",
    "nemotron_packed",
]


@dataclass(frozen=True)
class Golden:
    io: dict[str, Tensor]
    report: dict[str, Any]
    model: Model

    @property
    def labels(self) -> Tensor:
        return self.io["labels_pre_shifted"]  # [B, S]

    @property
    def per_depth(self) -> list[Tensor]:
        return [self.io[f"mtp_per_depth_h.{k}"] for k in range(self.report["mtp_depths"])]  # each [B, S, H]

    @property
    def tail(self) -> tuple[Tensor, ...]:
        """What a last stage appends for packed rows."""
        return (self.io["seq_idx"].int(),) if "seq_idx" in self.io else ()


@pytest.fixture(params=FOLDERS)
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = GOLDEN / request.param
    report, weights = json.loads((folder / "report.json").read_text()), load_file(folder / "model.safetensors")
    head = weights["lm_head.weight" if "lm_head.weight" in weights else "head.weight"]
    return Golden(load_file(folder / "io.safetensors"), report, Model(head, MTPConfig(**report["mtp_config"])))


def close(found: Tensor, expected: float) -> bool:
    return abs(found.item() / expected - 1) < 1e-5


# --- AutoModel's figures


@plain_losses
def test_losses_against_automodel(golden: Golden, loss: nn.Module) -> None:
    report = golden.report
    output = calculate_mtp_loss(
        loss,
        mtp_per_depth_h=golden.per_depth,
        labels=golden.labels,
        model=golden.model,
        scaling_factor=report["mtp_loss_scaling_factor"],
        seq_idx=golden.io.get("seq_idx"),
        return_per_depth=True,
    )
    main = calculate_loss(
        loss,
        labels=golden.labels,
        logits=golden.io["logits"],
        hidden_states=golden.io["last_hidden"],
        model=golden.model,
    )
    assert close(output.loss, report["mtp_loss_sum_reduction"])
    assert len(output.per_depth_losses) == report["mtp_depths"]
    for found, expected in zip(output.per_depth_losses, report["mtp_per_depth_losses_sum"], strict=True):
        assert close(found, expected)
    assert close(main, report["main_sum_ce_pre_shifted"])


@plain_losses
def test_normalised_loss_against_automodel(golden: Golden, loss: nn.Module) -> None:
    if "mtp_loss_normalised_by_num_label_tokens" not in golden.report:
        expected = golden.report["mtp_loss_sum_reduction"] / golden.report["n_label_tokens"]
    else:
        expected = golden.report["mtp_loss_normalised_by_num_label_tokens"]
    found = calculate_mtp_loss(
        loss,
        mtp_per_depth_h=golden.per_depth,
        labels=golden.labels,
        model=golden.model,
        seq_idx=golden.io.get("seq_idx"),
        num_label_tokens=int((golden.labels != -100).sum()),
    )
    assert close(found, expected)


def test_pipeline_against_automodel(golden: Golden) -> None:
    loss = MTPLossConfig().build(MaskedCrossEntropy(), golden.model)
    stage = (golden.io["logits"], *golden.per_depth, *golden.tail)
    assert close(loss(stage, golden.labels), golden.report["pipeline_total_loss_tuple"])
    if "pipeline_total_loss_modeloutput" in golden.report:  # nothing says where documents end
        output = SimpleNamespace(logits=golden.io["logits"], mtp_per_depth_h=golden.per_depth)
        assert close(loss(output, golden.labels), golden.report["pipeline_total_loss_modeloutput"])


@pytest.mark.parametrize("golden", [f for f in FOLDERS if f.startswith("nemotron")], indirect=True)
def test_stored_logits_give_the_same_loss(golden: Golden) -> None:
    found = calculate_mtp_loss(
        MaskedCrossEntropy(),
        mtp_per_depth_logits=[golden.io[f"mtp_logits.{k}"] for k in range(golden.report["mtp_depths"])],
        labels=golden.labels,
        model=nn.Identity(),
        seq_idx=golden.io.get("seq_idx"),
    )
    assert close(found, golden.report["mtp_loss_sum_reduction"])
