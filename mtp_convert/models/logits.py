"""From hidden states to logits and the main loss, and the arguments that decide on both.

Symbols: B rows, S positions, H hidden size, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from mtp_convert.models.token_losses import IGNORED_LABEL


def keep_positions(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` positions of [B, S, H], those that a tensor names, or all of them for 0."""
    return hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]


def next_token_loss(logits: Tensor, labels: Tensor, last: Tensor | None) -> Tensor:
    """Mean cross entropy of logits [B, S, V] at i against labels [B, S] at i + 1; those of -100 count for nothing.

    `last`: bool [B, S], true at the last position of every packed document, which has no next token.
    """
    targets = labels[:, 1:]
    if last is not None:
        targets = targets.masked_fill(last[:, :-1], IGNORED_LABEL)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL)


def keep_problems(keep: int | Tensor, labels: Tensor | None) -> list[str]:
    """Why a forward pass cannot go with this `logits_to_keep`, if it cannot."""
    problems = []
    if isinstance(keep, int) and keep < 0:
        problems.append(f"logits_to_keep is {keep}, expected 0 (all) or more")
    if labels is not None and (isinstance(keep, Tensor) or keep):
        problems.append("labels need the logits of all positions, but logits_to_keep is given")
    return problems
