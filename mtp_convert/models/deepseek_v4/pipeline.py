"""Splitting a DeepSeek-V4 model into pipeline stages, and what passes between them.

Symbols: B rows of a microbatch, S positions, H hidden size, X streams, V vocabulary, D MTP depths.

Between stages travel the streams [B, S, X, H] and, since only the first stage can embed, the D embeddings [B, S, H]
of the shifted ids. The last stage yields logits [B, S, V] and D hidden states [B, S, H].
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_convert.models.deepseek_v4.config import hash_layers
from mtp_convert.models.stages import cut, layer_problems, with_modules

if TYPE_CHECKING:
    from mtp_convert.models.deepseek_v4.model import DeepseekV4ForCausalLM


def stage_modules(
    model: "DeepseekV4ForCausalLM", names: Sequence[Sequence[str]], *, layers_prefix: str, text_model: nn.Module | None
) -> list[list[str]]:
    """Module names of every stage, with those that DeepSeek-V4 needs beside its layers.

    Every stage gets `{layers_prefix}rotary_emb`; the last one also `{layers_prefix}hc_head` and `mtp`, each as far as
    `text_model` (default: the backbone) and the model have them. The lists given are not changed.

    Raises ValueError if the stages do not hold every layer once, or a layer that chooses experts by token id is not
    on the first stage, the only one that is given token ids.
    """
    backbone: Any = model.model if text_model is None else text_model
    _check_layers(names, [f"{layers_prefix}layers.{i}" for i in backbone.layers], hash_layers(model.config))
    shared = [f"{layers_prefix}rotary_emb"]
    ending = [f"{layers_prefix}hc_head"] * (getattr(backbone, "hc_head", None) is not None)
    ending += ["mtp"] * (model.mtp is not None)
    stages = [with_modules(stage, shared) for stage in names]
    return [*stages[:-1], with_modules(stages[-1], ending)]


def cut_stage(model: "DeepseekV4ForCausalLM", names: Iterable[str]) -> "DeepseekV4ForCausalLM":
    """A copy of the model with these modules and the rotary one; the others are None, or gone from `model.layers`.

    Raises ValueError for names that the model does not have, and for a last stage (with `lm_head`) that lacks what
    belongs to it.
    """
    return cut(model, {*names, "model.rotary_emb"}, ending={"model.hc_head", "model.norm", "mtp"})


def stage_metas(
    model: "DeepseekV4ForCausalLM", *, is_first: bool, microbatch_size: int, seq_len: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of one stage as tensors on the meta device."""
    config, depths = model.config, model.num_mtp_depths
    place = (microbatch_size, seq_len)

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*place, *shape, dtype=of, device="meta")

    embeds = tuple(meta(config.hidden_size) for _ in range(depths))
    between = (meta(config.hc_mult, config.hidden_size), *embeds)
    inputs = (meta(of=torch.long),) if is_first else between
    outputs = (meta(config.vocab_size), *embeds) if model.lm_head is not None else between
    return inputs, outputs


def _check_layers(names: Sequence[Sequence[str]], layers: Sequence[str], hashed: Sequence[int]) -> None:
    problems = layer_problems(names, layers)
    problems += [
        f"{layers[i]} chooses experts by token id, so it must be on the first stage"
        for i in hashed
        if i < len(layers) and any(layers[i] in stage for stage in names[1:])
    ]
    if problems:
        raise ValueError("; ".join(problems))
