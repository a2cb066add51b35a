"""Sides of models with module trees of their own: transformers' blocks, and the MTP depths that it leaves out.

They run Hugging Face folders and native ones whose names they know; which names, `mtp_convert.models` says.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.models.deepseek_v4 import DeepseekV4ForCausalLM
from mtp_convert.models.deepseek_v4.names import spellings
from mtp_convert.models.nemotron_v3 import BackendConfig, NemotronHForCausalLM
from mtp_convert.models.nemotron_v3.weights import sources_of
from mtp_convert.verify.model_side import ModelSide, Runnable, facts_of
from mtp_convert.verify.residency import grouped, slots
from mtp_convert.verify.stored_weights import CheckpointValues
from mtp_convert.verify.watch import Call, Point, Streams

Tree = NemotronHForCausalLM | DeepseekV4ForCausalLM
Parts = Mapping[str, Tensor]  # stored tensors that make one of the tree, as views of it
_HEAD = {"model.embed_tokens": "embedding", "model": "final_norm", "lm_head": "logits"}


class ViewedWeights:
    """Tensors of a tree of which stored tensors are views; ValueError names all that are missing or differ in shape."""

    def __init__(self, parts: Mapping[str, Parts], values: CheckpointValues) -> None:
        self._parts, self._values = parts, values
        wanted = {source: view.shape for part in parts.values() for source, view in part.items()}
        problems = [f"missing {source}" for source in sorted(wanted.keys() - values.keys())]
        problems += [
            f"{source}: shape {list(values[source].shape)}, expected {list(shape)}"
            for source, shape in wanted.items()
            if source in values and values[source].shape != shape
        ]
        if problems:
            raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))

    def sources(self, name: str) -> tuple[str, ...]:
        """See Weights."""
        return tuple(self._parts[name])

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Weights."""
        found = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in wanted.items()}

        def load(part: tuple[str, str], values: CheckpointValues) -> None:
            name, source = part
            view = self._parts[name][source]  # of a tensor without memory: lay the same view over this one
            place = found[name].as_strided(view.shape, view.stride(), view.storage_offset())
            place.copy_(values[source].whole())

        self._values.each([(name, source) for name in wanted for source in self._parts[name]], load)
        return found


def nemotron_side(checkpoint: Checkpoint) -> ModelSide:
    """The side of a Nemotron-H or Nemotron 3 folder."""
    facts = facts_of(checkpoint, "transformers' NemotronH blocks, mtp-convert's MTP")
    return ModelSide(facts, partial(_build_nemotron, checkpoint))


def deepseek_v4_side(checkpoint: Checkpoint) -> ModelSide:
    """The side of a DeepSeek-V4 folder."""
    facts = facts_of(checkpoint, "transformers' DeepseekV4 blocks, mtp-convert's MTP")
    return ModelSide(facts, partial(_build_deepseek_v4, checkpoint))


def _runnable(
    model: Tree,
    points: Iterator[Point],
    prefixes: Mapping[str, str],
    parts: Callable[[str, Tensor, Container[str]], Parts],
    checkpoint: Checkpoint,
    *,
    embeds: tuple[str, ...] = (),
) -> Runnable:
    """`embeds`: the group that a depth needs to embed its tokens, if they are not embedded all at once before."""
    layers, steps, depths = len(model.model.layers), model.num_mtp_depths, model.mtp_config.num_physical_depths
    prefixes = {**_HEAD, **{f"model.layers.{i}": f"layers.{i}" for i in range(layers)}, **prefixes}
    values = CheckpointValues(checkpoint.stored)
    found = slots(model)
    heads = [g for k in range(steps) for g in (*embeds, f"mtp.{k % depths}.fused", f"mtp.{k % depths}.block")]

    def drive(ids: Tensor) -> None:
        for hidden in model(ids).mtp_per_depth_h or ():
            assert model.lm_head is not None
            model.lm_head(hidden)

    return Runnable(
        root=model,
        layers=layers,
        steps=steps,
        points=tuple(points),
        groups=grouped(found, prefixes),
        order=("embedding", *(f"layers.{i}" for i in range(layers)), "final_norm", "logits", *heads, "logits"),
        weights=ViewedWeights({name: parts(name, slot.tensor, values) for name, slot in found.items()}, values),
        form=Streams(),
        drive=drive,
    )


def _shared_points(model: Tree) -> Iterator[Point]:
    """Embedding, layers and head; the first and the last are called by every MTP step too."""
    backbone: Any = model.model
    head, steps = model.lm_head, model.num_mtp_depths
    assert head is not None
    size, dtype = model.config.hidden_size, head.get_parameter("weight").dtype

    def nothing_embedded(ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.shape, size, dtype=dtype, device=ids_BS.device)

    embedded = (Call("embedding", enters=False), *(Call(f"mtp.{k}.fused", False, False) for k in range(steps)))
    yield Point(backbone.embed_tokens, embedded, "embedding", skipped=nothing_embedded)
    for i, layer in backbone.layers.items():
        yield Point(layer, (Call(f"layers.{i}"),), f"layers.{i}")
    scored = (Call("logits"), *(Call(f"mtp.{k}.logits") for k in range(steps)))
    yield Point(head, scored, "logits")


def _build_nemotron(checkpoint: Checkpoint, dtype: torch.dtype) -> Runnable:
    config = NemotronHConfig.from_pretrained(checkpoint.config_path)
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False  # the tree's head holds a tensor of its own
    with torch.device("meta"):
        model = NemotronHForCausalLM(
            config,
            BackendConfig(experts="eager"),
            num_nextn_predict_layers=checkpoint.steps,
            mtp_use_repeated_layer=checkpoint.repeated,
            dtype=dtype,
        )
    model.eval().compute_mtp_in_eval = True
    depths, length = model.mtp_config.num_physical_depths, model.mtp_config.pattern_length
    prefixes: dict[str, str] = {}
    for d in range(depths):
        prefixes |= {f"mtp.layers.{f}": f"mtp.{d}.block" for f in range(d * length, (d + 1) * length)}
        prefixes |= {f"mtp.layers.{d * length}.{part}": f"mtp.{d}.fused" for part in ("enorm", "hnorm", "eh_proj")}

    def parts(name: str, tensor: Tensor, stored: Container[str]) -> Parts:
        name = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        sources = sources_of(name, len(tensor) if tensor.dim() else 0, stored)
        return {sources[0]: tensor} if len(sources) == 1 else dict(zip(sources, tensor.unbind(0), strict=True))

    return _runnable(model, _nemotron_points(model), prefixes, parts, checkpoint)


def _nemotron_points(model: NemotronHForCausalLM) -> Iterator[Point]:
    steps, depths = model.num_mtp_depths, model.mtp_config.num_physical_depths
    backbone: Any = model.model
    yield from _shared_points(model)
    yield Point(backbone.norm, (Call("final_norm"),), "final_norm")
    for d in range(depths):
        assert model.mtp is not None
        first, *others = model.mtp.depth_layers(d)
        runs, group = range(d, steps, depths), f"mtp.{d}.block"
        yield Point(first, tuple(Call(f"mtp.{k}.fused") for k in runs), f"mtp.{d}.fused", "fuse")
        yield Point(first, tuple(Call(f"mtp.{k}.block", leaves=False) for k in runs), group, "_run")
        inside = tuple(Call(f"mtp.{k}.block", False, False) for k in runs)
        yield from (Point(other, inside, group, "_run") for other in others)
        norm = [first, *others][-1].get_submodule("final_layernorm")
        yield Point(norm, tuple(Call(f"mtp.{k}.block", enters=False) for k in runs), group)


def _build_deepseek_v4(checkpoint: Checkpoint, dtype: torch.dtype) -> Runnable:
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(checkpoint.model_config, num_nextn_predict_layers=checkpoint.steps, dtype=dtype)
    model.eval().compute_mtp_in_eval = True
    prefixes: dict[str, str] = {}
    for k in range(model.num_mtp_depths):
        prefixes[f"mtp.layers.{k}"] = f"mtp.{k}.block"
        prefixes |= {f"mtp.layers.{k}.{part}": f"mtp.{k}.fused" for part in ("enorm", "hnorm", "e_proj", "h_proj")}
    layers = len(model.model.layers)

    def parts(name: str, tensor: Tensor, stored: Container[str]) -> Parts:
        options = list(spellings(name, tensor, layers=layers))
        return next((option for option in options if any(source in stored for source in option)), options[0])

    return _runnable(model, _deepseek_v4_points(model), prefixes, parts, checkpoint, embeds=("embedding",))


def _deepseek_v4_points(model: DeepseekV4ForCausalLM) -> Iterator[Point]:
    steps = model.num_mtp_depths

    def one_stream(streams: Tensor) -> Tensor:
        return streams[:, :, 0]

    yield from _shared_points(model)
    yield Point(model.model, (Call("final_norm"),), "final_norm", "collapse", skipped=one_stream)
    for k in range(steps):
        block: Any = model.get_submodule(f"mtp.layers.{k}")
        place = group = f"mtp.{k}.block"
        yield Point(block, (Call(f"mtp.{k}.fused"),), f"mtp.{k}.fused", "fuse")
        yield Point(block, (Call(place, leaves=False),), group, "decode")
        yield Point(block.hc_head, (Call(place, False, False),), group, skipped=one_stream)
        yield Point(block.norm, (Call(place, enters=False),), group)
