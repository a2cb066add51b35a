"""Real forward passes of both sides, each by its own code and its own names.

The Hugging Face side is transformers' model with the MTP heads as modules; the Megatron side is Megatron-Core's
computation written over Megatron's own tensor names. Neither reads a table of the converter, so a table that is wrong
cannot make them agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtp_convert.containers.base import Stored
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.gather import Reader

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
        drafts = self.mtp_logits[k].argmax(-1)[:, : -(k + 1)]
        return float((drafts == self.logits.argmax(-1)[:, k + 1 :]).double().mean())


def run_hf(folder: Path, ids: Tensor, *, steps: int | None = None) -> Forward:
    """Run a Hugging Face folder with transformers' own model and its MTP depths, in float32."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it recommends GPU kernels on every machine
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = TREES.get(str(config.get("model_type")), _decoder)
    with torch.no_grad():
        return run(folder, ids, steps)


def _decoder(folder: Path, ids: Tensor, steps: int | None) -> Forward:
    """Models whose MTP depth is one more decoder layer."""
    from mtp_convert.models.hf_mtp import HfWithMtp

    out = HfWithMtp.from_folder(folder)(ids, steps)
    return Forward(out.logits, out.mtp_logits)


def _nemotron_h(folder: Path, ids: Tensor, steps: int | None) -> Forward:
    from mtp_convert.models.nemotron_h import NemotronHWithMTP

    out = NemotronHWithMTP.from_folder(folder, dtype=torch.float32)(ids, mtp_steps=steps)
    return Forward(out.logits, out.mtp_logits)


def _deepseek_v4(folder: Path, ids: Tensor, steps: int | None) -> Forward:
    from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM

    if steps is not None:
        raise ValueError("DeepSeek-V4 runs as many MTP depths as are stored")
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.compute_mtp_in_eval = True
    out, head = model(ids), model.get_output_embeddings()
    assert out.logits is not None
    assert head is not None
    return Forward(out.logits, tuple(head(h) for h in out.mtp_per_depth_h or ()))


# Models with trees of their own, by the config's `model_type`.
TREES: dict[str, Callable[[Path, Tensor, int | None], Forward]] = {
    "nemotron_h": _nemotron_h,
    "deepseek_v4": _deepseek_v4,
}


def run_megatron(stored: Stored, ids: Tensor) -> Forward:
    """Run a Megatron checkpoint from its own names and arguments, in float32."""
    out = predict(stored, ids)
    return Forward(out.logits, out.mtp_logits)


@torch.no_grad()
def predict(stored: Stored, ids: Tensor) -> Prediction:
    """Everything that Megatron's model computes for token ids [B, S]: its module tree, loaded by name, in float32.

    Raises:
        ValueError: the checkpoint has no training arguments, or tensors that the model of these arguments has not.
    """
    from mtp_convert.models.megatron.config import TransformerConfig
    from mtp_convert.models.megatron.gpt_model import GPTModel
    from mtp_convert.models.megatron.hybrid_model import HybridModel
    from mtp_convert.models.megatron.loading import load_rank, load_tensors

    args = stored.arguments.get("args")
    if not isinstance(args, dict) or not args:
        raise ValueError("the checkpoint carries no training arguments")
    true_size = {"vocab_size": args["vocab_size"]} if args.get("vocab_size") else {}
    config = TransformerConfig.from_megatron_args(args, params_dtype=torch.float32, **true_size)
    model = (GPTModel if config.hybrid is None else HybridModel)(config).eval()
    (load_rank if stored.container == "legacy" else load_tensors)(model, tensors_of(stored))
    return model.predict(ids)


def tensors_of(stored: Stored) -> dict[str, Tensor]:
    """Every tensor of a (small) checkpoint in memory, as float32."""
    reader = Reader()
    found = {}
    try:
        for name, tensor in stored.tensors.items():
            raw = np.empty(tensor.nbytes, dtype=np.uint8)
            StoredExtent(tensor).fill(reader, raw, 0, tensor.nbytes)
            values = torch.from_numpy(raw).view(tensor.dtype.torch()).reshape(tensor.shape)
            found[name] = values.float() if values.is_floating_point() else values
    finally:
        reader.close()
    return found


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
