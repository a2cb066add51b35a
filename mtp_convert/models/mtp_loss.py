"""The training loss of MTP depths, alone and added to the main loss at the end of a pipeline.

Labels are those of the next token (label t is token t + 1), not yet moved for any depth. Depth k = 0, 1, .. predicts
at position t the label k + 1 places ahead, token t + k + 2; where the row or the packed document ends before that
there is nothing to predict. The MTP loss is `scaling_factor` times the mean of the depths' losses, each computed by
the loss function of the main path. Symbols: B rows, S positions, H hidden size, V vocabulary, D depths.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_convert.models.linear_ce import LinearCrossEntropy
from mtp_convert.models.losses import calculate_loss, get_lm_head, get_lm_head_weight, loss_ignore_index
from mtp_convert.models.mtp import get_mtp_loss_scaling_factor
from mtp_convert.models.mtp_inputs import checked_targets, per_depth_targets, roll_tensor
from mtp_convert.models.packed_rows import seq_idx_of_labels
from mtp_convert.models.stage_output import StageOutput


@dataclass(frozen=True)
class MTPLossOutput:
    """The MTP loss and its parts; all of them carry their autograd graph.

    Attributes:
        loss: scalar, `scaling_factor` times the mean of `per_depth_losses`.
        per_depth_losses: one scalar per depth, not scaled.
    """

    loss: Tensor
    per_depth_losses: list[Tensor]


class MTPLossArguments(TypedDict, total=False):
    """Keywords of `calculate_mtp_loss` beside `return_per_depth`.

    Attributes:
        mtp_per_depth_h: what the depths computed, each [B, S, H] ([1, T, H] or [T, H] for labels [T]).
        mtp_per_depth_logits: instead, for depths with LM heads of their own, each [.., V].
        mtp_per_depth_targets: labels already moved and masked for every depth, each of the shape of `labels`; a rank
            that holds a piece of the sequence cannot make them (`prepare_mtp_context_parallel_inputs` does).
        labels: [B, S], or [T] for one flat packed row.
        model: owner of the LM head; not asked for one if logits are given.
        scaling_factor: weight of the mean of the depths' losses, 0.1 by default; None takes the model's.
        num_label_tokens: labels that count in the whole step; divides a sum.
        ignore_index: None, or what `loss_fn` has.
        cu_seqlens: borders of packed documents, [K + 1] or [1, K + 1], the same in all rows; negative entries are
            padding. Places behind the last border are one more document.
        seq_idx: [B, S], [S] or, for labels [T], [1, T]: equal numbers mark one document. Goes before `cu_seqlens`.
        lm_weight: the LM head's weight [V, H], gathered by the caller; only a `LinearCrossEntropy` reads it.
        logits_dtype: cast the LM head's logits to this type; None leaves them. A head with a weight of another type
            than the hidden states (float32 beside bfloat16) gets them in its own.
        grad_reduce_group: see `LinearCrossEntropy.materialize_lm_weight`.
        loss_weights: [B, S], a factor per label; moves along with the labels.
    """

    mtp_per_depth_h: Sequence[Tensor] | None
    mtp_per_depth_logits: Sequence[Tensor] | None
    mtp_per_depth_targets: Sequence[Tensor] | None
    labels: Required[Tensor]
    model: Required[nn.Module]
    scaling_factor: float | None
    num_label_tokens: int | None
    ignore_index: int | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    lm_weight: Tensor | None
    logits_dtype: torch.dtype | None
    grad_reduce_group: dist.ProcessGroup | None
    loss_weights: Tensor | None


@overload
def calculate_mtp_loss(
    loss_fn: nn.Module, *, return_per_depth: Literal[False] = ..., **arguments: Unpack[MTPLossArguments]
) -> Tensor: ...


@overload
def calculate_mtp_loss(
    loss_fn: nn.Module, *, return_per_depth: Literal[True], **arguments: Unpack[MTPLossArguments]
) -> MTPLossOutput: ...


def calculate_mtp_loss(
    loss_fn: nn.Module,
    *,
    mtp_per_depth_h: Sequence[Tensor] | None = None,
    mtp_per_depth_logits: Sequence[Tensor] | None = None,
    mtp_per_depth_targets: Sequence[Tensor] | None = None,
    labels: Tensor,
    model: nn.Module,
    scaling_factor: float | None = 0.1,
    num_label_tokens: int | None = None,
    ignore_index: int | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lm_weight: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_reduce_group: dist.ProcessGroup | None = None,
    loss_weights: Tensor | None = None,
    return_per_depth: bool = False,
) -> Tensor | MTPLossOutput:
    """The MTP loss of one batch, a scalar, or an `MTPLossOutput` with `return_per_depth`.

    A depth is not normalised by the number of labels it has left: with `num_label_tokens` every depth is divided by
    that one number.

    Args:
        loss_fn: the loss of the main path.
        return_per_depth: give the parts too.
        others: see `MTPLossArguments`.

    Raises:
        ValueError: arguments exclude each other, are empty or of the wrong shape, or the model has no LM head.
    """
    ignored = _checked_ignore_index(loss_fn, ignore_index)
    outputs = _per_depth_outputs(mtp_per_depth_h, mtp_per_depth_logits, labels)
    targets: Iterable[Tensor]
    if mtp_per_depth_targets is None:
        targets = per_depth_targets(labels, seq_idx_of_labels(labels, seq_idx, cu_seqlens), len(outputs), ignored)
    else:
        excluded = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "loss_weights": loss_weights}
        targets = checked_targets(mtp_per_depth_targets, labels, len(outputs), excluded)
    if mtp_per_depth_logits is not None:
        to_inputs = _from_logits(loss_fn)
    elif isinstance(loss_fn, LinearCrossEntropy):
        to_inputs = _from_hidden(loss_fn, model, lm_weight, grad_reduce_group)
    else:
        to_inputs = _through_lm_head(model, logits_dtype)
    losses = [
        calculate_loss(
            loss_fn,
            labels=target,
            num_label_tokens=num_label_tokens,
            loss_weights=None if loss_weights is None else roll_tensor(loss_weights, -depth - 1),
            **to_inputs(output),
        )
        for depth, (output, target) in enumerate(zip(outputs, targets, strict=True))
    ]
    factor = get_mtp_loss_scaling_factor(model) if scaling_factor is None else scaling_factor
    total = torch.stack(losses).sum(0) * (factor / len(losses))
    return MTPLossOutput(total, losses) if return_per_depth else total


def _checked_ignore_index(loss_fn: nn.Module, given: int | None) -> int:
    own = loss_ignore_index(loss_fn)
    if given is not None and given != own:
        raise ValueError(f"ignore_index is {given}, but {type(loss_fn).__name__} leaves out {own}")
    return own


def _per_depth_outputs(
    hidden: Sequence[Tensor] | None, logits: Sequence[Tensor] | None, labels: Tensor
) -> Sequence[Tensor]:
    """What the depths computed, each of the shape of `labels` and one dimension more."""
    if (hidden is None) == (logits is None):
        got = "neither" if hidden is None else "both"
        raise ValueError(f"expected either mtp_per_depth_h or mtp_per_depth_logits, got {got}")
    name, outputs = ("mtp_per_depth_h", hidden) if hidden is not None else ("mtp_per_depth_logits", logits)
    if not outputs:
        raise ValueError(f"{name} is empty, expected one tensor per depth")
    if labels.dim() == 1:  # a model gives a flat packed row a batch dimension back
        outputs = [o.squeeze(0) if o.dim() == 3 and o.shape[0] == 1 else o for o in outputs]
    wrong = [f"depth {k}: {tuple(o.shape)}" for k, o in enumerate(outputs) if o.shape[:-1] != labels.shape]
    if wrong:
        raise ValueError(f"{name} does not match labels.shape {tuple(labels.shape)}: {', '.join(wrong)}")
    return outputs


_ToInputs = Callable[[Tensor], dict[str, Any]]  # output of a depth -> what `calculate_loss` is told of it


def _from_logits(loss_fn: nn.Module) -> _ToInputs:
    if isinstance(loss_fn, LinearCrossEntropy):
        raise ValueError(f"{type(loss_fn).__name__} computes logits itself and cannot take mtp_per_depth_logits")
    return lambda logits: {"logits": logits}


def _from_hidden(
    loss_fn: LinearCrossEntropy, model: nn.Module, lm_weight: Tensor | None, group: dist.ProcessGroup | None
) -> _ToInputs:
    if lm_weight is None:  # once for all depths, see `materialize_lm_weight`
        lm_weight = loss_fn.materialize_lm_weight(get_lm_head_weight(model), grad_reduce_group=group)
    shared = {"model": model, "lm_weight": lm_weight, "grad_reduce_group": group}
    return lambda hidden: {"hidden_states": hidden} | shared


def _through_lm_head(model: nn.Module, logits_dtype: torch.dtype | None) -> _ToInputs:
    head = get_lm_head(model)
    if head is None:
        raise ValueError("lm_head module not found in model")
    weight = getattr(head, "weight", None)
    # A plain linear layer refuses another dtype; a quantised one (one byte per number) brings its own rules.
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype.itemsize > 1 else None

    def logits(hidden: Tensor) -> dict[str, Any]:
        z = head(hidden if dtype is None else hidden.to(dtype))
        return {"logits": z if logits_dtype is None else z.to(logits_dtype)}

    return logits


class PipelineCausalLMLoss(nn.Module):
    """The loss at the last stage of a pipeline: the main loss, and the MTP loss if the model trains and made any.

    The stage's output may be
    - a tuple `(logits, *per depth[, seq_idx])`, where an int32 tensor [B, S] at the end can only be `seq_idx` of this
      microbatch, and the depths' outputs are hidden states, or logits if `model.mtp_outputs_are_logits`;
    - a model output or mapping with `logits` or `hidden_states`, and perhaps `mtp_per_depth_h` or
      `mtp_per_depth_logits` and `mtp_loss_scaling_factor` (None counts as absent);
    - logits, or for a `LinearCrossEntropy` hidden states after the final norm.

    Args:
        loss_fn: the loss of the main path.
        model: what the last stage runs: owner of the LM head, `training` and `mtp_config`. No submodule of this
            loss.
        scaling_factor: None takes the output's, or else the model's.
        ignore_index: None, or what `loss_fn` has.
        grad_reduce_group: see `LinearCrossEntropy.materialize_lm_weight`.

    Attributes:
        cu_seqlens: borders of packed documents, set by the caller for models that append no `seq_idx`.

    Raises:
        ValueError: `ignore_index` is not the loss's.
    """

    model: nn.Module

    def __init__(
        self,
        loss_fn: nn.Module,
        model: nn.Module,
        scaling_factor: float | None = None,
        ignore_index: int | None = None,
        grad_reduce_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.__dict__["model"] = model  # plain attribute: its parameters and its training mode are its own
        self.scaling_factor = scaling_factor
        self.ignore_index = _checked_ignore_index(loss_fn, ignore_index)
        self.grad_reduce_group = grad_reduce_group
        self.cu_seqlens: Tensor | None = None

    def forward(self, output: object, labels: Tensor) -> Tensor:
        """The loss of one microbatch; `labels` [B, S], `output` see the class.

        Raises:
            ValueError: the output lacks what the loss needs; a tuple cannot serve a `LinearCrossEntropy`.
        """
        seq_idx, output = self._extract_seq_idx_tail(output)
        takes_hidden = isinstance(self.loss_fn, LinearCrossEntropy)
        if takes_hidden and isinstance(output, tuple):
            raise ValueError(
                f"{type(self.loss_fn).__name__} is not supported with MTP in a pipeline: a tuple has logits"
            )
        parts = StageOutput.read(output, model=self.model, takes_hidden=takes_hidden)
        lm_weight = None
        if isinstance(self.loss_fn, LinearCrossEntropy):
            weight = get_lm_head_weight(self.model)
            lm_weight = self.loss_fn.materialize_lm_weight(weight, grad_reduce_group=self.grad_reduce_group)
        loss = calculate_loss(
            self.loss_fn,
            labels=labels,
            logits=parts.logits,
            hidden_states=parts.hidden_states,
            model=self.model,
            lm_weight=lm_weight,
            grad_reduce_group=self.grad_reduce_group,
        )
        made_any = parts.mtp_per_depth_h is not None or parts.mtp_per_depth_logits is not None
        if not (made_any and self.model.training):
            return loss
        return loss + calculate_mtp_loss(
            self.loss_fn,
            mtp_per_depth_h=parts.mtp_per_depth_h,
            mtp_per_depth_logits=parts.mtp_per_depth_logits,
            labels=labels,
            model=self.model,
            scaling_factor=parts.scaling_factor if self.scaling_factor is None else self.scaling_factor,
            ignore_index=self.ignore_index,
            cu_seqlens=self.cu_seqlens,
            seq_idx=seq_idx,
            lm_weight=lm_weight,
            grad_reduce_group=self.grad_reduce_group,
        )

    @staticmethod
    def _extract_seq_idx_tail(output: object) -> tuple[Tensor | None, object]:
        """`seq_idx` and the output without it; None and the output if it has no such tail."""
        if isinstance(output, tuple) and output:
            last = output[-1]
            if isinstance(last, Tensor) and last.dtype == torch.int32 and last.dim() == 2:
                return last, output[:-1]
        return None, output


@dataclass(frozen=True)
class MTPLossConfig:
    """Settings of the MTP loss; whether there is one follows from the model's outputs.

    Attributes:
        scaling_factor: None keeps what the model says.
        ignore_index: None keeps what the loss says; another value than that is refused.
    """

    scaling_factor: float | None = None
    ignore_index: int | None = None

    def build(
        self, loss_fn: nn.Module, model: nn.Module, *, grad_reduce_group: dist.ProcessGroup | None = None
    ) -> PipelineCausalLMLoss:
        """The main loss of `loss_fn` and the MTP loss of `model` in one module."""
        return PipelineCausalLMLoss(loss_fn, model, self.scaling_factor, self.ignore_index, grad_reduce_group)
