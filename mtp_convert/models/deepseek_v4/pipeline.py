"""Splitting a DeepSeek-V4 model into pipeline stages, and what passes between them.

Symbols: B rows of a microbatch, S positions, H hidden size, X streams, V vocabulary, D MTP depths.

Between stages travel the streams [B, S, X, H] and, since only the first stage can embed, the D embeddings [B, S, H]
of the shifted ids. The last stage yields logits [B, S, V] and D hidden states [B, S, H].
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_convert.models.deepseek_v4.config import hash_layers

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
    stages = [_append(stage, shared) for stage in names]
    return [*stages[:-1], _append(stages[-1], ending)]


def cut_stage(model: "DeepseekV4ForCausalLM", names: Iterable[str]) -> "DeepseekV4ForCausalLM":
    """A copy of the model with these modules and the rotary one; the others are None, or gone from `model.layers`.

    Raises ValueError for names that the model does not have, and for a last stage (with `lm_head`) that lacks what
    belongs to it.
    """
    kept = {*names, "model.rotary_emb"}
    stage = copy.deepcopy(model)
    if unknown := sorted(name for name in kept if not _has(stage, name)):
        raise ValueError(f"modules of a stage that the model does not have: {unknown}")
    ending = {"model.hc_head", "model.norm", *(["mtp"] if stage.mtp is not None else [])}
    if "lm_head" in kept and (lacking := sorted(ending - kept)):
        raise ValueError(f"the last stage lacks {lacking}")
    for owner, prefix in ((stage, ""), (stage.model, "model.")):
        for name in [n for n, _ in owner.named_children() if n not in ("model", "layers")]:
            if prefix + name not in kept:
                setattr(owner, name, None)
    for index in [i for i in stage.model.layers if f"model.layers.{i}" not in kept]:
        del stage.model.layers[index]
    return stage


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


def _append(stage: Sequence[str], names: Sequence[str]) -> list[str]:
    return [*stage, *(name for name in names if name not in stage)]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_layers(names: Sequence[Sequence[str]], layers: Sequence[str], hashed: Sequence[int]) -> None:
    if not names:
        raise ValueError("no stages are given")
    placed = [name for stage in names for name in stage]
    problems = [f"{name} is on {placed.count(name)} stages" for name in layers if placed.count(name) != 1]
    problems += [
        f"{layers[i]} chooses experts by token id, so it must be on the first stage"
        for i in hashed
        if i < len(layers) and any(layers[i] in stage for stage in names[1:])
    ]
    if problems:
        raise ValueError("; ".join(problems))
