"""The MTP loss: what each depth predicts, how its loss is weighted, and how its gradient joins the main loss's.

Symbols: B batch, S sequence, H hidden size, V vocabulary, D depths. Depth d (from 0) predicts token i + d + 2 at
position i, so labels and loss mask are rolled d + 1 times; positions whose label lies beyond the sequence drop out.
The loss that a model returns is the language model's alone: `MTPLossAutoScaler` adds the MTP gradients on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mtp_convert.models.megatron.groups import Group, current_groups
from mtp_convert.models.megatron.loss_logging import MTPLossLoggingHelper
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.roll import roll_tensor

TokenLoss = Callable[[Tensor, Tensor], Tensor]  # labels [B, S], logits [S, B, V] -> [B, S]


class MTPLossConfig(Protocol):
    """What a TransformerConfig says about the MTP loss."""

    @property
    def mtp_num_layers(self) -> int | None:
        """MTP depths D."""

    @property
    def mtp_loss_scaling_factor(self) -> float | None:
        """Weight of all depths together beside the main loss."""

    @property
    def calculate_per_token_loss(self) -> bool:
        """Whether gradients are divided by the number of tokens after the whole batch."""

    @property
    def mtp_detach_heads(self) -> bool:
        """Whether the MTP loss trains the MTP layers alone."""


class OutputLayer(Protocol):
    """The head that the main model and all depths share."""

    @property
    def weight(self) -> Tensor | None:
        """[V, H], None if it is passed with every call."""

    def __call__(
        self, hidden: Tensor, *, weight: Tensor | None, runtime_gather_output: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden [S, B, H] to logits [S, B, V] and a bias that is not used here."""


class MTPLossAutoScaler(torch.autograd.Function):
    """Passes `output` through and, on the way back, gives `mtp_loss` the gradient of a loss term of its own."""

    main_loss_backward_scale: ClassVar[Tensor] = torch.tensor(1.0)

    @staticmethod
    def forward(ctx: Any, output: Tensor, mtp_loss: Tensor) -> Tensor:  # noqa: ANN401  (autograd's context)
        """`output` as it is; `mtp_loss` of any shape is tied to it."""
        ctx.save_for_backward(mtp_loss)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """The gradient of `output` unchanged, and the main loss's scale for every element of `mtp_loss`."""
        (mtp_loss,) = ctx.saved_tensors
        return grad_output, torch.ones_like(mtp_loss) * MTPLossAutoScaler.main_loss_backward_scale

    @staticmethod
    def set_loss_scale(scale: Tensor) -> None:
        """Set the scale of all following backward passes; it must be the main loss's (grad scale / microbatches)."""
        MTPLossAutoScaler.main_loss_backward_scale = scale


@dataclass(frozen=True, eq=False)
class DepthTargets:
    """What one depth is to predict."""

    labels: Tensor  # [B, S]
    loss_mask: Tensor  # [B, S], zero where there is no label
    num_tokens: Tensor  # scalar, sum of the mask

    def token_loss(self, logits: Tensor, compute: TokenLoss) -> Tensor:
        """Loss per token [B, S] of logits [S, B, V]."""
        return self.loss_mask * compute(self.labels, logits)

    def mean(self, token_loss: Tensor) -> Tensor:
        """The mean over tokens that count, as it is logged; 0 without any."""
        return token_loss.sum() / self.num_tokens.clamp(min=1)

    def acceptance(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens [S, B] are the expected ones, and how many were expected."""
        valid = self.loss_mask.bool()
        return ((predicted.transpose(0, 1) == self.labels) & valid).sum().float(), valid.sum().float()


def mtp_depth_targets(
    labels: Tensor,
    loss_mask: Tensor,
    depths: int,
    *,
    cp_group: Group | None = None,
    packed_seq_params: PackedSeqParams | None = None,
) -> Iterator[DepthTargets]:
    """Targets of every depth from the main model's labels and mask [B, S], each one token further."""
    for _ in range(depths):
        labels, _sum = roll_tensor(labels, -1, -1, cp_group, packed_seq_params)
        loss_mask, num_tokens = roll_tensor(loss_mask, -1, -1, cp_group, packed_seq_params)
        yield DepthTargets(labels, loss_mask, num_tokens)


def language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
    """Cross entropy per token [B, S] in float32 or better, of labels [B, S] and logits [S, B, V], V complete."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact.permute(1, 2, 0), labels, reduction="none")


def process_mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: OutputLayer,
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: TokenLoss,
    config: MTPLossConfig,
    cp_group: Group | None = None,
    tp_group: Group | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    scale_logits_fn: Callable[[Tensor], Tensor] | None = None,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Attach the loss of every depth to the main hidden states.

    `hidden_states` [(1 + D) * S, B, H] are the main model's and every depth's, one after another; the main ones
    [S, B, H] come back with unchanged values. `labels` [B, S] are next tokens; without them they are made from
    `input_ids`, without either no loss is attached. `loss_mask` [B, S] is all ones if not given. Losses and acceptance
    counts go to `MTPLossLoggingHelper` if `is_training`. ValueError for a sequence that is not 1 + D parts.
    """
    main, *per_depth = _split_depths(hidden_states, config)
    if labels is None and input_ids is None:
        return main
    labels, loss_mask = _next_tokens(labels, loss_mask, input_ids, cp_group, packed_seq_params)
    if config.mtp_detach_heads:
        output_weight = _weight(output_layer, output_weight).detach()
    total = loss_mask.sum()
    targets = mtp_depth_targets(
        labels, loss_mask, len(per_depth), cp_group=cp_group, packed_seq_params=packed_seq_params
    )
    for depth, (hidden, target) in enumerate(zip(per_depth, targets, strict=True)):
        logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        if scale_logits_fn is not None:
            logits = scale_logits_fn(logits)
        token_loss = target.token_loss(logits, compute_language_model_loss)
        if is_training:
            sharded = _is_vocab_sharded(output_layer, runtime_gather_output)
            predicted = predict_tokens(logits.detach(), tp_group if sharded else None)
            MTPLossLoggingHelper.save_metrics_to_tracker(
                target.mean(token_loss),
                *target.acceptance(predicted),
                depth,
                len(per_depth),
                avg_group=current_groups().dp_cp,
            )
        weighted = token_loss * loss_weight(config, target.num_tokens, total)
        main = MTPLossAutoScaler.apply(main, weighted)  # type: ignore[no-untyped-call]
    return main


def loss_weight(config: MTPLossConfig, num_tokens: Tensor, total: Tensor) -> Tensor:
    """Weight of a depth's loss per token: alpha / D, divided by its own number of tokens.

    With `calculate_per_token_loss` gradients are later divided by `total`, the number of tokens of the main loss, which
    is taken back here: a depth has fewer tokens than the main model.
    """
    share = (config.mtp_loss_scaling_factor or 0.0) / (config.mtp_num_layers or 1)
    return share * (total if config.calculate_per_token_loss else 1) / num_tokens.clamp(min=1)


def predict_tokens(logits: Tensor, tp_group: Group | None = None) -> Tensor:
    """Most likely token ids [S, B] from logits [S, B, V], or from this rank's V / tp columns with a `tp_group`.

    Of equal logits the lowest id wins.
    """
    if tp_group is None or tp_group.size() == 1:
        return logits.argmax(-1)
    if not isinstance(tp_group, dist.ProcessGroup):
        raise ValueError(f"a vocabulary over {tp_group.size()} ranks needs a torch.distributed process group")
    best, token = logits.max(-1)
    all_best = [torch.empty_like(best) for _ in range(tp_group.size())]
    all_token = [torch.empty_like(token) for _ in range(tp_group.size())]
    dist.all_gather(all_best, best, group=tp_group)
    dist.all_gather(all_token, token, group=tp_group)
    rank = torch.stack(all_best).argmax(0, keepdim=True)  # [1, S, B]
    return (rank * logits.size(-1) + torch.stack(all_token).gather(0, rank)).squeeze(0)


def _split_depths(hidden_states: Tensor, config: MTPLossConfig) -> tuple[Tensor, ...]:
    parts = 1 + (config.mtp_num_layers or 0)
    if hidden_states.size(0) % parts:
        raise ValueError(f"{hidden_states.size(0)} positions are not {parts} equal parts (main and every depth)")
    return hidden_states.chunk(parts)


def _next_tokens(
    labels: Tensor | None,
    loss_mask: Tensor | None,
    input_ids: Tensor | None,
    cp_group: Group | None,
    packed_seq_params: PackedSeqParams | None,
) -> tuple[Tensor, Tensor]:
    """Labels and mask as given, or made from the input: then the last position has no label and must not count."""
    if labels is not None:
        return labels, torch.ones_like(labels) if loss_mask is None else loss_mask
    assert input_ids is not None
    mask = torch.ones_like(input_ids) if loss_mask is None else loss_mask
    made, _ = roll_tensor(input_ids, -1, -1, cp_group, packed_seq_params)
    mask, _ = roll_tensor(mask, -1, -1, cp_group, packed_seq_params)
    return made, mask


def _weight(output_layer: OutputLayer, output_weight: Tensor | None) -> Tensor:
    weight = output_layer.weight if output_weight is None else output_weight
    if weight is None:
        raise ValueError("the output layer has no weight of its own and none was passed")
    return weight


def _is_vocab_sharded(output_layer: OutputLayer, runtime_gather_output: bool | None) -> bool:
    """Whether a rank's logits cover its own part of the vocabulary."""
    if runtime_gather_output is not None:
        return not runtime_gather_output
    return not getattr(output_layer, "gather_output", False)
