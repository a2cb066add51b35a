"""Collects the MTP losses of a training step over microbatches and ranks, for the log."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_convert.models.megatron.groups import Group

_COUNTS = ("correct_values", "total_values")
_VALUES = ("loss_values", *_COUNTS)


class Writer(Protocol):
    """A TensorBoard writer."""

    def add_scalar(self, tag: str, value: Tensor, step: int) -> object:
        """Write one number."""


class WandbWriter(Protocol):
    """A Weights & Biases run or module."""

    def log(self, data: Mapping[str, Tensor], step: int) -> object:
        """Write named numbers."""


class MTPLossLoggingHelper:
    """Sums per depth, in one tracker per process.

    `loss_values`, `correct_values` and `total_values` are float32 [depths]: the sums over microbatches of the mean
    loss, of the correctly predicted tokens and of the tokens predicted. `reduce_group` and `avg_group` say over which
    ranks they are summed, or averaged, before they are written.
    """

    tracker: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def save_loss_to_tracker(
        loss: Tensor,
        layer_number: int | None,
        num_layers: int,
        reduce_group: Group | None = None,
        avg_group: Group | None = None,
    ) -> None:
        """Add the scalar loss of depth `layer_number` of `num_layers`; None as depth adds nothing.

        Another number of depths than before starts from zero.
        """
        _add({"loss_values": loss}, layer_number, num_layers, reduce_group, avg_group)

    @staticmethod
    def save_metrics_to_tracker(
        loss: Tensor,
        correct: Tensor,
        total: Tensor,
        layer_number: int | None,
        num_layers: int,
        reduce_group: Group | None = None,
        avg_group: Group | None = None,
    ) -> None:
        """`save_loss_to_tracker`, with the number of `correct` tokens among the `total` that the depth predicted."""
        values = {"loss_values": loss, "correct_values": correct, "total_values": total}
        _add(values, layer_number, num_layers, reduce_group, avg_group)

    @staticmethod
    def clean_loss_in_tracker() -> None:
        """Zero the sums and forget the groups; cumulative counts stay."""
        tracker = MTPLossLoggingHelper.tracker
        for name in _VALUES:
            if name in tracker:
                tracker[name].zero_()
        tracker["reduce_group"] = tracker["avg_group"] = None

    @staticmethod
    def reduce_loss_in_tracker() -> None:
        """Replace the sums by those over all ranks. Over `avg_group` losses are averaged, counts summed."""
        tracker = MTPLossLoggingHelper.tracker
        for name in _VALUES:
            if name in tracker:
                _sum_over(tracker[name], tracker["reduce_group"])
                ranks = _sum_over(tracker[name], tracker["avg_group"])
                if name == "loss_values":
                    tracker[name] /= ranks

    clean_metrics_in_tracker = clean_loss_in_tracker
    reduce_metrics_in_tracker = reduce_loss_in_tracker

    @staticmethod
    def track_mtp_metrics(
        loss_scale: float | Tensor,
        iteration: int,
        writer: Writer | None,
        wandb_writer: WandbWriter | None = None,
        total_loss_dict: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        """Reduce, write and clear what was collected for `iteration`.

        Per depth d from 1: `mtp_{d} loss`, the sum times `loss_scale` (1 / microbatches), which is also added to
        `total_loss_dict`; and where tokens were counted, `mtp_{d}_acceptance_rate` and, since the process started,
        `mtp_{d}_cumulative_acceptance_rate`, in percent.
        """
        tracker = MTPLossLoggingHelper.tracker
        if "loss_values" not in tracker:
            return
        MTPLossLoggingHelper.reduce_loss_in_tracker()
        rates = _acceptance_rates(tracker)
        for depth, loss in enumerate(tracker["loss_values"] * loss_scale):
            name = f"mtp_{depth + 1}"
            if total_loss_dict is not None:
                total_loss_dict[f"{name} loss"] = total_loss_dict.get(f"{name} loss", torch.zeros_like(loss)) + loss
            scalars = {f"{name} loss": loss} | {f"{name}_{kind}": rate[depth] for kind, rate in rates.items()}
            for tag, value in scalars.items():
                if writer is not None:
                    writer.add_scalar(tag, value, iteration)
                if wandb_writer is not None:
                    wandb_writer.log({tag: value}, iteration)
        MTPLossLoggingHelper.clean_loss_in_tracker()


def _add(
    values: Mapping[str, Tensor],
    depth: int | None,
    depths: int,
    reduce_group: Group | None,
    avg_group: Group | None,
) -> None:
    if depth is None:
        return
    tracker = MTPLossLoggingHelper.tracker
    for name, value in values.items():
        if name not in tracker or len(tracker[name]) != depths:
            tracker[name] = torch.zeros(depths, device=value.device)
        tracker[name][depth] += value.detach()
    tracker["reduce_group"], tracker["avg_group"] = reduce_group, avg_group


def _sum_over(values: Tensor, group: Group | None) -> int:
    """Sum in place over the ranks of a group; the number of ranks. ValueError for a group that cannot communicate."""
    if group is None or group.size() == 1:
        return 1
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"reducing over {group.size()} ranks needs a torch.distributed process group")
    dist.all_reduce(values, group=group)
    return group.size()


def _acceptance_rates(tracker: dict[str, Any]) -> dict[str, Tensor]:
    """Percent of tokens predicted right per depth [depths], of this step and since the start."""
    if not tracker.keys() >= set(_COUNTS):
        return {}
    for name in _COUNTS:
        so_far = tracker.get(f"cumulative_{name}")
        known = so_far is not None and so_far.shape == tracker[name].shape
        tracker[f"cumulative_{name}"] = tracker[name] + so_far if known else tracker[name].clone()
    kinds = {"acceptance_rate": "", "cumulative_acceptance_rate": "cumulative_"}
    # a step may have no token that counts
    return {
        kind: tracker[f"{prefix}correct_values"] / tracker[f"{prefix}total_values"].clamp(min=1) * 100
        for kind, prefix in kinds.items()
    }
