"""Real forward passes of both sides, each by its own code and its own names.

The Hugging Face side is transformers' model with the MTP heads as modules; the Megatron side is Megatron-Core's
computation written over Megatron's own tensor names. Neither reads a table of the converter, so a table that is wrong
cannot make them agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtp_convert.containers.base import Stored
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.gather import Reader


@dataclass(frozen=True)
class Forward:
    """Outputs for token ids [B, S]: main logits [B, S, V] and the logits of every MTP step, each [B, S, V]."""

    logits: Tensor
    mtp_logits: tuple[Tensor, ...]

    def acceptance(self, k: int = 0) -> float:
        """Share of positions where the draft of step k is the main model's own choice for that token.

        Step k at position i and the main model at position i + k + 1 both predict token i + k + 2.
        """
        drafts = self.mtp_logits[k].argmax(-1)[:, : -(k + 1)]
        return float((drafts == self.logits.argmax(-1)[:, k + 1 :]).double().mean())


def run_hf(folder: Path, ids: Tensor, *, steps: int | None = None) -> Forward:
    """Run a Nemotron-H folder with transformers, in float32."""
    from transformers.utils import logging

    from mtp_convert.models.nemotron_h import NemotronHWithMTP

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it recommends GPU kernels on every machine
    with torch.no_grad():
        out = NemotronHWithMTP.from_folder(folder, dtype=torch.float32)(ids, mtp_steps=steps)
    return Forward(out.logits, out.mtp_logits)


def run_megatron(stored: Stored, ids: Tensor) -> Forward:
    """Run a Megatron torch_dist checkpoint of a hybrid model from its own keys and arguments, in float32."""
    from mtp_convert.models.megatron_hybrid import HybridSettings, MegatronHybrid

    args = stored.arguments.get("args")
    if not isinstance(args, dict) or not args:
        raise ValueError("the checkpoint carries no training arguments")
    model = MegatronHybrid(HybridSettings.from_megatron_args(args), load_tensors(stored))
    with torch.no_grad():
        out = model.forward(ids)
    return Forward(out.logits, out.mtp_logits)


def load_tensors(stored: Stored) -> dict[str, Tensor]:
    """Every tensor of a (small) checkpoint in memory, as float32."""
    reader = Reader()
    found = {}
    try:
        for name, tensor in stored.tensors.items():
            raw = np.empty(tensor.nbytes, dtype=np.uint8)
            StoredExtent(tensor).fill(reader, raw, 0, tensor.nbytes)
            values = torch.from_numpy(raw).view(tensor.dtype.torch()).reshape(tensor.shape)
            found[name] = values.float()
    finally:
        reader.close()
    return found


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
