"""One side of a verification: a checkpoint as a model that runs place by place, and who watches it.

Both sides give their values in the same form, whatever their modules are called: batch first, hidden states [B, S, H]
(streams of hyper-connections [B, S, n * H]), logits [B, S, V] over the true vocabulary. Places are named in
`mtp_convert.verify.result`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.verify.result import SideFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mtp_convert.checkpoint import Checkpoint


class Tap(Protocol):
    """Sees what goes into every place and what comes out."""

    def enter(self, place: str, value: Tensor) -> Tensor:
        """What the place shall run on instead of `value`, its hidden input: of the same shape, dtype and device.

        Called for every place but the embedding; for `mtp.k.fused` with the previous hidden state.
        """

    def leave(self, place: str, value: Tensor) -> None:
        """The output of a place. The tensor may be a view of what the model goes on with: not to be written to."""


class Side(Protocol):
    """A checkpoint that runs."""

    facts: SideFacts

    def places(self) -> tuple[str, ...]:
        """Every place of the model, each behind those whose output it needs: the same order on both sides."""

    def tensors(self, place: str) -> tuple[str, ...]:
        """Stored tensors that feed a place, sorted."""

    def run(
        self,
        ids: Tensor,
        tap: Tap,
        *,
        dtype: torch.dtype,
        device: torch.device,
        streamed: bool,
        only: Collection[str] | None = None,
    ) -> None:
        """One forward pass over `ids` [B, S], int64.

        streamed: weights are read when a place is entered and freed when it is left, so that memory holds about two
        layers. only: run these places, those whose choice of keys they share, and no others (weights of the others are
        not read); `tap.enter` is then given a value without meaning, of the right shape, and must replace it.
        """


def open_side(checkpoint: Checkpoint, *, backend: str = "") -> Side:
    """The side that runs a checkpoint, by its layout and family.

    backend: `megatron-core` for the installed one instead of this package's tree, for Megatron checkpoints alone.

    Raises:
        ConvertError: MTP032 if nothing runs it, or not that backend.
    """
    where, megatron = checkpoint.located.given.name, checkpoint.layout.name == "megatron"
    if backend not in ("", "megatron-core" if megatron else ""):
        problem = Problem(
            "backend", where, backend, "megatron-core or none" if megatron else "none: it is not Megatron's"
        )
        raise ConvertError("MTP032", problem)
    try:
        if megatron:
            return _megatron(backend)(checkpoint)
        return _transformers(str(checkpoint.model_config.get("model_type")))(checkpoint)
    except ValueError as error:
        first, *others = str(error).splitlines()
        raise ConvertError("MTP032", [Problem(line.strip(), where) for line in others or [first]]) from error


# Sides are imported when they are opened: each needs a module tree, and not every run needs all of them.
def _megatron(backend: str) -> Callable[[Checkpoint], Side]:
    if backend:
        from mtp_convert.verify.megatron_core_side import MegatronCoreSide

        return MegatronCoreSide
    from mtp_convert.verify.megatron_side import megatron_side

    return megatron_side


def _transformers(model_type: str) -> Callable[[Checkpoint], Side]:
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it recommends GPU kernels on every machine
    if model_type in ("nemotron_h", "deepseek_v4"):
        from mtp_convert.verify import tree_side

        return tree_side.nemotron_side if model_type == "nemotron_h" else tree_side.deepseek_v4_side
    from mtp_convert.verify.hf_side import hf_side

    return hf_side
