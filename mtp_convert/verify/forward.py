"""Real forward passes of whole (small) checkpoints, in float32 on the CPU: the sides without a judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.containers.base import Stored
from mtp_convert.verify.metrics import acceptance, distance
from mtp_convert.verify.model_side import ModelSide
from mtp_convert.verify.result import SideFacts
from mtp_convert.verify.side import Side, open_side
from mtp_convert.verify.stored_weights import CheckpointValues
from mtp_convert.verify.taps import Recorder

if TYPE_CHECKING:
    from mtp_convert.models.megatron.language_model import Prediction


@dataclass(frozen=True)
class Forward:
    """Outputs for token ids [B, S]: main logits [B, S, V] and the logits of every MTP step, each [B, S, V]."""

    logits: Tensor
    mtp_logits: tuple[Tensor, ...]

    def acceptance(self, k: int = 0) -> float:
        """Share of positions where the draft of step k is the main model's own choice for that token.

        Step k at position i and the main model at position i + k + 1 both predict token i + k + 2.
        """
        return acceptance(self.mtp_logits[k], self.logits, k)


def run_hf(folder: Path, ids: Tensor, *, steps: int | None = None) -> Forward:
    """Run a Hugging Face folder with transformers' own model and its MTP depths.

    steps: run the one stored depth that often.
    """
    checkpoint = open_checkpoint(folder)
    if steps is not None:
        checkpoint = replace(checkpoint, steps=steps, repeated=True)
    found = _outputs(open_side(checkpoint), ids)
    return Forward(found["logits"], _steps(found, "logits"))


def run_megatron(stored: Stored, ids: Tensor) -> Forward:
    """Run a Megatron checkpoint from its own names and arguments."""
    out = predict(stored, ids)
    return Forward(out.logits, out.mtp_logits)


def predict(stored: Stored, ids: Tensor) -> Prediction:
    """Everything that Megatron's model computes for token ids [B, S]: its module tree, loaded by name.

    Raises:
        ValueError: the checkpoint has no training arguments, or tensors that the model of these arguments has not.
    """
    from mtp_convert.models.megatron.language_model import Prediction
    from mtp_convert.verify.megatron_side import config_from, runnable

    args = stored.arguments.get("args")
    if not isinstance(args, dict) or not args:
        raise ValueError("the checkpoint carries no training arguments")
    facts = SideFacts(str(stored.folder), "", "megatron", stored.container, {})
    found = _outputs(ModelSide(facts, partial(runnable, stored, config_from(args))), ids)
    return Prediction(found["logits"], found["final_norm"], _steps(found, "block"), _steps(found, "logits"))


def tensors_of(stored: Stored) -> dict[str, Tensor]:
    """Every tensor of a (small) checkpoint in memory, as float32."""
    found = {name: values.whole() for name, values in CheckpointValues(stored).items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`."""
    return distance(b, a).relative


def _outputs(side: Side, ids: Tensor) -> Mapping[str, Tensor]:
    """What every place gives."""
    tap = Recorder()
    side.run(ids, tap, dtype=torch.float32, device=torch.device("cpu"), streamed=False)
    return tap.outputs


def _steps(found: Mapping[str, Tensor], part: str) -> tuple[Tensor, ...]:
    """The outputs of one part of every MTP step."""
    steps = sum(place.startswith("mtp.") and place.endswith(f".{part}") for place in found)
    return tuple(found[f"mtp.{k}.{part}"] for k in range(steps))
