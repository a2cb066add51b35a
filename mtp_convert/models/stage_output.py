"""What the last stage of a pipeline, or a whole model, gives to its loss, told apart by meaning.

Symbols: B rows, S positions, H hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn


@dataclass(frozen=True)
class StageOutput:
    """Main output and what the MTP depths made; None for what is not there.

    Attributes:
        logits: [B, S, V].
        hidden_states: [B, S, H], after the final norm.
        mtp_per_depth_h: one [B, S, H] per depth.
        mtp_per_depth_logits: one [B, S, V] per depth, of models whose depths have LM heads of their own.
        scaling_factor: weight of the MTP loss.
    """

    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    mtp_per_depth_h: Sequence[Tensor] | None = None
    mtp_per_depth_logits: Sequence[Tensor] | None = None
    scaling_factor: float | None = None

    @classmethod
    def read(cls, output: object, *, model: nn.Module, takes_hidden: bool) -> Self:
        """Tell the parts of `output` apart.

        A tuple is `(logits, *depths)`, where `model.mtp_outputs_are_logits` says what the depths gave. A lone tensor
        is hidden states if the loss `takes_hidden`, else logits. Anything else has fields or keys of these names, and
        `mtp_loss_scaling_factor`.

        Raises:
            ValueError: the tuple is empty.
        """
        if isinstance(output, tuple):
            if not output:
                raise ValueError("the stage's output is an empty tuple, expected logits first")
            logits, *depths = output
            if getattr(model, "mtp_outputs_are_logits", False):
                return cls(logits, mtp_per_depth_logits=depths or None)
            return cls(logits, mtp_per_depth_h=depths or None)
        if isinstance(output, Tensor):
            return cls(hidden_states=output) if takes_hidden else cls(output)
        hidden = _field(output, "hidden_states")
        if isinstance(hidden, list | tuple):  # of all layers; those not asked for are None
            hidden = next((h for h in reversed(hidden) if h is not None), None)
        return cls(
            logits=_field(output, "logits"),
            hidden_states=hidden,
            mtp_per_depth_h=_field(output, "mtp_per_depth_h") or None,
            mtp_per_depth_logits=_field(output, "mtp_per_depth_logits") or None,
            scaling_factor=_field(output, "mtp_loss_scaling_factor"),
        )


def _field(output: object, name: str) -> Any:  # noqa: ANN401  (models type their outputs as they like)
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
