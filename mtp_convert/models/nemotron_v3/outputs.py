"""What a forward pass of the causal model yields, and the small steps from arguments to outputs.

Symbols: B rows, S positions, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from mtp_convert.models.logits import keep_problems


@dataclass
class NemotronHCausalLMOutputWithPast(CausalLMOutputWithPast):
    """transformers' output with two fields for MTP.

    Attributes:
        loss: mean cross entropy of the logits alone; what MTP adds is the trainer's (`calculate_mtp_loss`).
        logits: [B, S or kept, V]; position i predicts token i + 1.
        past_key_values: the cache that was given or asked for.
        hidden_states: one tensor [B, S, H], after the final norm, if asked for.
        mtp_per_depth_h: one [B, S, H] per depth, for the LM head; position i of depth k predicts token i + k + 2.
            None if MTP did not run.
        mtp_loss_scaling_factor: weight of the mean of the depths' losses; None if MTP did not run.
    """

    # Declared fields survive wrappers that rebuild outputs, attributes set later do not.
    mtp_per_depth_h: list[Tensor] | None = None
    mtp_loss_scaling_factor: float | None = None


def argument_problems(labels: Tensor | None, keep: int | Tensor, *, length: int, stage: bool) -> list[str]:
    """Why a forward pass over `length` positions cannot have these labels and `logits_to_keep`, if it cannot."""
    problems = keep_problems(keep, labels)
    if labels is not None and labels.shape[-1] != length:
        problems.append(f"labels have {labels.shape[-1]} positions, expected {length}")
    if labels is not None and stage:
        problems.append("a pipeline stage computes no loss: give labels to the pipeline's loss function")
    return problems


def as_rows(t: Tensor, dims: int) -> Tensor:
    """`t` with `dims` dimensions; one row with one less becomes a batch of one."""
    return t.unsqueeze(0) if t.dim() == dims - 1 else t
