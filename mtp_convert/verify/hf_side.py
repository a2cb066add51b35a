"""The Hugging Face side: transformers' own model, with its MTP depths as more decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.models.hf_mtp import NAMES, Depth, HfWithMtp, load_config
from mtp_convert.models.hf_weights import Made, Recipe
from mtp_convert.verify.model_side import ModelSide, Runnable, facts_of, order_of
from mtp_convert.verify.residency import grouped, slots
from mtp_convert.verify.stored_weights import CheckpointValues
from mtp_convert.verify.watch import Call, Point, Streams

_FUSION = ("enorm", "hnorm", "eh_proj")


class ConvertedWeights:
    """Tensors of transformers' classes, made of stored ones by transformers' own conversions."""

    def __init__(self, made: Mapping[str, Made], values: CheckpointValues) -> None:
        self._made, self._values = made, values

    def sources(self, name: str) -> tuple[str, ...]:
        """See Weights."""
        return self._made[name].sources

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Weights; ValueError for a tensor that is made in another shape."""
        by_recipe: dict[Recipe, list[str]] = {}
        for name in wanted:
            by_recipe.setdefault(self._made[name].recipe, []).append(name)
        raw: dict[str, Tensor] = {}

        def load(name: str, values: CheckpointValues) -> None:
            raw[name] = values[name].whole()

        self._values.each([source for recipe in by_recipe for _, source in recipe.sources], load)
        found: dict[str, Tensor] = {}
        for recipe, names in by_recipe.items():
            made = recipe.make(raw.pop)
            for name in names:
                value, like = made[self._made[name].name], wanted[name]
                if value.shape != like.shape:
                    raise ValueError(f"{name}: shape {list(value.shape)}, expected {list(like.shape)}")
                found[name] = value.to(like.dtype).contiguous()
        return found


def hf_side(checkpoint: Checkpoint) -> ModelSide:
    """The side of a folder that transformers can load; ValueError if it cannot, or MTP tensors are not understood."""
    return ModelSide(facts_of(checkpoint, "transformers, MTP as its decoder layers"), partial(_build, checkpoint))


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Runnable:
    config = load_config(checkpoint.config_path)
    values = CheckpointValues(checkpoint.stored)
    root, made = HfWithMtp.empty(config, values.keys(), dtype)
    layers, depths = len(root.model.model.layers), len(root.depths)
    if bool(depths) != bool(checkpoint.steps):
        known = f"known are those of {', '.join(sorted(NAMES))}"
        raise ValueError(f"no MTP tensors under names that are known for model_type {config.mtp_kind!r}; {known}")
    prefixes = {"model.model.embed_tokens": "embedding", "model.model.norm": "final_norm", "model.lm_head": "logits"}
    prefixes |= {f"model.model.layers.{i}": f"layers.{i}" for i in range(layers)}
    for d in range(depths):
        prefixes |= {f"depths.{d}.{part}": f"mtp.{d}.fused" for part in _FUSION}
        prefixes[f"depths.{d}"] = f"mtp.{d}.block"
    return Runnable(
        root=root,
        layers=layers,
        steps=checkpoint.steps,
        points=tuple(_points(root, checkpoint.steps)),
        groups=grouped(slots(root), prefixes),
        order=order_of(layers, [k % depths for k in range(checkpoint.steps)]),
        weights=ConvertedWeights(made, values),
        form=Streams(),
        drive=partial(root, steps=checkpoint.steps),
        guides=_guides(config),
    )


def _guides(config: Any) -> dict[str, str]:  # noqa: ANN401 - a config class of transformers
    """Layers without an indexer, and the last one before that has one."""
    found, full = {}, ""
    for i, kind in enumerate(getattr(config, "indexer_types", None) or ()):
        if kind == "shared":
            found[f"layers.{i}"] = full
        else:
            full = f"layers.{i}"
    return found


def _points(root: HfWithMtp, steps: int) -> Iterator[Point]:
    """Where the places are. Every stored depth runs at step d, d + depths, ..."""
    model, depths = root.model, len(root.depths)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()

    def passed(hidden: Tensor) -> Any:  # noqa: ANN401 - what a layer returns
        return (hidden, None) if hasattr(model.config, "indexer_types") else hidden  # the keys that it chose

    def nothing_embedded(ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.shape, model.config.hidden_size, dtype=model.dtype, device=ids_BS.device)

    embedded = (Call("embedding", enters=False), *(Call(f"mtp.{k}.fused", False, False) for k in range(steps)))
    yield Point(embed, embedded, "embedding", skipped=nothing_embedded)
    for i, layer in enumerate(model.model.layers):
        yield Point(layer, (Call(f"layers.{i}"),), f"layers.{i}", skipped=passed)
    yield Point(model.model.norm, (Call("final_norm"),), "final_norm")
    yield Point(head, (Call("logits"), *(Call(f"mtp.{k}.logits") for k in range(steps))), "logits")
    for d, depth in enumerate(root.depths):
        assert isinstance(depth, Depth)
        runs, group = range(d, steps, depths), f"mtp.{d}.block"
        yield Point(depth, tuple(Call(f"mtp.{k}.fused") for k in runs), f"mtp.{d}.fused", "fuse")
        yield Point(depth.layer, tuple(Call(f"mtp.{k}.block", leaves=False) for k in runs), group)
        yield Point(depth.final_norm, tuple(Call(f"mtp.{k}.block", enters=False) for k in runs), group)
