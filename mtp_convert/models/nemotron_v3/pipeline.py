"""Splitting the model into pipeline stages, and what passes between them.

Symbols: B rows of a microbatch, S positions, H hidden size, V vocabulary, D MTP depths (0 without MTP).

Between stages travel the hidden states [B, S, H] and, since only the first stage can embed, the D embeddings [B, S, H]
of the shifted ids. The last stage yields logits [B, S, V], D hidden states [B, S, H] and the document numbers, int32
[B, S] (all 1 without packed rows), which the loss needs. Without MTP a stage yields one tensor alone.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_convert.models.logits import keep_positions
from mtp_convert.models.mtp import roll_tensor
from mtp_convert.models.nemotron_v3.batch import Batch
from mtp_convert.models.nemotron_v3.outputs import as_rows
from mtp_convert.models.stages import cut, layer_problems, with_modules

if TYPE_CHECKING:
    from mtp_convert.models.nemotron_v3.model import NemotronHForCausalLM


def is_stage(model: "NemotronHForCausalLM") -> bool:
    """Whether modules of a whole model are gone.

    An attribute that is None was taken away; one that a stand-in never had says nothing.
    """
    backbone: Any = model.model
    if getattr(model, "lm_head", model) is None or getattr(backbone, "embed_tokens", model) is None:
        return True
    return hasattr(backbone, "layers") and len(backbone.layers) != model.config.num_hidden_layers


def stage_modules(
    model: "NemotronHForCausalLM", names: Sequence[Sequence[str]], *, layers_prefix: str, text_model: nn.Module | None
) -> list[list[str]]:
    """Module names of every stage, with `mtp` on the last one if the model has it; the lists given are not changed.

    Raises ValueError if there is no stage, or if the stages do not hold every block once.
    """
    backbone: Any = model.model if text_model is None else text_model
    if problems := layer_problems(names, [f"{layers_prefix}layers.{i}" for i in backbone.layers]):
        raise ValueError("; ".join(problems))
    *stages, last = map(list, names)
    return [*stages, with_modules(last, ["mtp"] * (model.mtp is not None))]


def cut_stage(model: "NemotronHForCausalLM", names: Iterable[str]) -> "NemotronHForCausalLM":
    """A copy of the model with these modules; others are None, or gone from `model.layers`.

    Raises ValueError for names that the model does not have, and if the stage with `lm_head` lacks what follows it.
    """
    return cut(model, set(names), ending={"model.norm", "mtp"})


def stage_metas(
    model: "NemotronHForCausalLM", *, is_first: bool, microbatch_size: int, seq_len: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of one stage as tensors on the meta device."""
    config, depths = model.config, model.num_mtp_depths

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(microbatch_size, seq_len, *shape, dtype=of, device="meta")

    carried = tuple(meta(config.hidden_size) for _ in range(depths))
    between = (meta(config.hidden_size), *carried)
    inputs = (meta(of=torch.long),) if is_first else between
    if model.lm_head is None:
        return inputs, between
    return inputs, (meta(config.vocab_size), *carried, *([meta(of=torch.int32)] if depths else []))


def must_embed_ahead(model: "NemotronHForCausalLM", *, stage: bool) -> bool:
    """Whether this is the stage that embeds for the depths of the last one."""
    return stage and model.num_mtp_depths > 0 and model.model.embed_tokens is not None


def embeddings_ahead(
    model: "NemotronHForCausalLM", input_ids: Tensor | None, embedded: Tensor | None = None
) -> tuple[Tensor, ...]:
    """D embeddings [B, S, H]: entry k is that of the ids k + 1 places to the left, followed by token 0.

    With `embedded` [B, S, H] those are moved instead, followed by zeros.

    Raises ValueError on a stage without embedding, or if there are no ids.
    """
    if embedded is not None:
        return tuple(roll_tensor(embedded, -k, dim=1) for k in range(1, model.num_mtp_depths + 1))
    embed = model.model.embed_tokens
    if embed is None:
        raise ValueError("this stage has no embed_tokens: the first stage makes the MTP embeddings")
    if input_ids is None or input_ids.is_floating_point():
        raise ValueError(f"MTP embeddings need token ids, got {None if input_ids is None else input_ids.dtype}")
    ids = as_rows(input_ids, 2)
    return tuple(embed(roll_tensor(ids, -k)) for k in range(1, model.num_mtp_depths + 1))


def stage_output(
    model: "NemotronHForCausalLM", hidden: Tensor, ahead: Sequence[Tensor], batch: Batch, keep: int | Tensor
) -> Tensor | tuple[Tensor, ...]:
    """What a stage passes on, from its own `hidden` [B, S, H] and the D embeddings `ahead`."""
    if model.lm_head is None:
        return (hidden, *ahead) if ahead else hidden
    logits = model.logits(keep_positions(hidden, keep))
    if not model.num_mtp_depths:
        return logits
    predicted = model.predict_ahead(hidden, ahead, batch)
    if predicted is None:  # the number and shapes of a stage's outputs are fixed beforehand
        predicted = [torch.zeros_like(hidden) for _ in range(model.num_mtp_depths)]
    if batch.documents is not None:
        return (logits, *predicted, batch.documents.seq_idx)
    return (logits, *predicted, torch.ones(hidden.shape[:2], dtype=torch.int32, device=hidden.device))


def stage_problems(model: "NemotronHForCausalLM", embeds: Sequence[Tensor], *, stage: bool) -> list[str]:
    """Why a forward pass cannot go with these MTP embeddings, if it cannot."""
    problems = []
    depths = model.num_mtp_depths
    if (embeds or (stage and model.model.embed_tokens is None)) and len(embeds) != depths:
        problems.append(f"{len(embeds)} MTP embeddings are given, expected {depths}")
    if stage and model.lm_head is not None and depths and model.mtp is None:
        problems.append("the last stage lacks mtp: see customize_pipeline_stage_modules")
    return problems
