"""Cross entropy straight from hidden states and the LM head, without the logits of all tokens.

The logits of T tokens and V words are the largest tensor of a training step, and MTP asks for them once more per
depth. Here never more than a few rows of them exist. Symbols: H hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from mtp_convert.models.token_losses import IGNORED_LABEL, REDUCTIONS, linear_losses, reduce_losses

_MIN_CHUNK = 128  # fewer rows make matrix products that no device runs well


class LinearCrossEntropy(nn.Module):
    """Base of the losses that take hidden states and the LM head's weight in place of logits."""

    @staticmethod
    def materialize_lm_weight(lm_weight: Tensor, *, grad_reduce_group: dist.ProcessGroup | None = None) -> Tensor:
        """The whole LM head weight [V, H]; what is no DTensor comes back as it is.

        Gather it once and give it to the main loss and all MTP depths: every gathered copy lives until backward. The
        gradient is the mean over the ranks, cut back into their shards, as FSDP does with its own.

        Raises:
            ValueError: a weight that needs a gradient is sharded over another number of ranks than
                `grad_reduce_group` has (1 for none). Each rank would keep its own tokens' gradient only.
        """
        if not isinstance(lm_weight, DTensor):
            return lm_weight
        if not (torch.is_grad_enabled() and lm_weight.requires_grad):
            return lm_weight.full_tensor()
        ranks = lm_weight.device_mesh.size()
        given = 1 if grad_reduce_group is None else dist.get_world_size(grad_reduce_group)
        if ranks != given:
            raise ValueError(
                "grad_reduce_group must hold the ranks that the LM head is sharded over: "
                f"mesh size={ranks}, reduction group size={given}"
            )
        partial = [Partial()] * lm_weight.device_mesh.ndim  # each rank's gradient is one summand of the true one
        whole = lm_weight.full_tensor(grad_placements=partial)
        whole.register_hook(lambda grad: grad / ranks)  # type: ignore[no-untyped-call]
        return whole


class FusedLinearCrossEntropy(LinearCrossEntropy):
    """Cross entropy of `hidden_states @ lm_weight.T`, of which only a chunk of rows exists at a time.

    The backward pass computes those logits again; it refuses `create_graph`.

    Args:
        ignore_index: label that counts for nothing.
        logit_softcapping: c > 0 replaces a logit z by c * tanh(z / c); 0 leaves it.
        reduction: "sum", "mean" (0 if no label counts) or "none".
        chunk_len: rows of logits at a time; None takes as many as fit into the size of the hidden states.

    Raises:
        ValueError: `reduction` or `chunk_len` is none of these.
    """

    def __init__(
        self,
        ignore_index: int = IGNORED_LABEL,
        logit_softcapping: float = 0.0,
        reduction: str = "sum",
        *,
        chunk_len: int | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")
        if chunk_len is not None and chunk_len < 1:
            raise ValueError(f"chunk_len is {chunk_len}, expected 1 or more")
        self.ignore_index = ignore_index
        self.logit_softcapping = logit_softcapping
        self.reduction = reduction
        self.chunk_len = chunk_len

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        lm_weight: Tensor,
        num_label_tokens: int | None = None,
        grad_reduce_group: dist.ProcessGroup | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar ([..] for "none") in float32; float64 for float64 inputs.

        Args:
            hidden_states: [.., H].
            labels: token ids or `ignore_index`, [..].
            lm_weight: [V, H], perhaps a DTensor.
            num_label_tokens: divides the sum; 0 gives 0.
            grad_reduce_group: see `materialize_lm_weight`.
            loss_weights: [..], a factor per token.

        Raises:
            ValueError: shapes do not fit, or an argument does not go with the reduction.
        """
        if hidden_states.shape[:-1] != labels.shape or hidden_states.shape[-1] != lm_weight.shape[-1]:
            raise ValueError(
                f"hidden_states {tuple(hidden_states.shape)}, labels {tuple(labels.shape)} and lm_weight "
                f"{tuple(lm_weight.shape)} do not fit, expected [.., H], [..] and [V, H]"
            )
        weight_VH = self.materialize_lm_weight(lm_weight, grad_reduce_group=grad_reduce_group)
        targets_T = labels.reshape(-1).to(hidden_states.device, torch.long)
        losses = linear_losses(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            weight_VH,
            targets_T,
            ignore_index=self.ignore_index,
            chunk_len=self.chunk_len or max(_MIN_CHUNK, hidden_states.numel() // len(weight_VH)),
            softcap=self.logit_softcapping,
        )
        return reduce_losses(
            losses.view(labels.shape),
            counted=targets_T != self.ignore_index,
            reduction=self.reduction,
            num_label_tokens=num_label_tokens,
            loss_weights=loss_weights,
        )
