"""The Megatron side: the tree that Megatron's training arguments describe, filled by Megatron's own names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import Stored
from mtp_convert.mapping.family import ConfigError
from mtp_convert.models.megatron.config import TransformerConfig
from mtp_convert.models.megatron.gpt_model import GPTModel
from mtp_convert.models.megatron.hybrid_model import HybridModel
from mtp_convert.models.megatron.language_model import LanguageModel
from mtp_convert.models.megatron.loading import check_tensors, local_tensor, mtp_experts
from mtp_convert.models.megatron.sharding import ShardedStateDict, ShardedTensor, iter_shards
from mtp_convert.verify.model_side import ModelSide, Runnable, facts_of, order_of
from mtp_convert.verify.residency import grouped, slots
from mtp_convert.verify.stored_weights import CheckpointValues
from mtp_convert.verify.watch import Call, Point, SequenceFirst

# The whole model in one process, however it was trained.
_ONE_STAGE: dict[str, Any] = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
}
_WRAPPERS = ("", "model.", "module.", "module.module.")
_EMBEDDING = "embedding.word_embeddings.weight"
_FUSION = ("enorm", "hnorm", "eh_proj", "e_proj", "h_proj")


class MegatronWeights:
    """Tensors of the tree as parts of stored ones; which parts, `sharded_state_dict` of the tree itself says.

    ValueError that names every tensor that is missing, left over or of another shape.
    """

    def __init__(self, model: LanguageModel, stored: Stored, unmapped: Collection[str]) -> None:
        self._values = CheckpointValues(stored)
        self._wrapper = next((w for w in _WRAPPERS if w + _EMBEDDING in self._values), "")
        tensors = {
            name.removeprefix(self._wrapper): tensor
            for name, tensor in self._values.items()
            if name not in unmapped and not name.endswith("_extra_state")
        }
        entries = model.sharded_state_dict(metadata=_spelling(tensors))
        own = slots(model)
        self._entries: ShardedStateDict = {name: entry for name, entry in entries.items() if name in own}
        if stored.container == "legacy":  # ranks store what modules hold, under the modules' own names
            self._entries = {name: _as_held(name, entry) for name, entry in self._entries.items()}
        check_tensors(model, self._entries, tensors)

    def sources(self, name: str) -> tuple[str, ...]:
        """See Weights."""
        return tuple(self._wrapper + shard.key for shard in iter_shards(self._entries[name]))

    def read(self, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See Weights."""
        found: dict[str, Tensor] = {}

        def load(name: str, values: CheckpointValues) -> None:
            tensors = {source.removeprefix(self._wrapper): values[source] for source in self.sources(name)}
            found[name] = local_tensor(self._entries[name], tensors).to(wanted[name].dtype).contiguous()

        self._values.each(wanted, load)
        return found


def _spelling(names: Mapping[str, object]) -> dict[str, bool]:
    """How this checkpoint stores layers and experts, as Megatron's metadata for `sharded_state_dict` says it."""
    return {
        "non_homogeneous_layers": any(name.startswith("decoder.layers.0.") for name in names),
        "singleton_local_shards": any(".experts.experts.0." in name for name in names),
    }


def _as_held(name: str, entry: Any) -> ShardedTensor:  # noqa: ANN401 - any entry of one tensor
    """The entry of a tensor that is stored as the module holds it."""
    padded = isinstance(entry, ShardedTensor) and entry.allow_shape_mismatch
    return ShardedTensor.from_rank_offsets(name, entry.data, allow_shape_mismatch=padded)


def megatron_side(checkpoint: Checkpoint) -> ModelSide:
    """The side of a Megatron checkpoint; ValueError if the tree cannot run what its arguments say."""
    stored, config = checkpoint.stored.arguments.get("args"), checkpoint.model_config
    if isinstance(stored, dict) and stored:
        args = {name: value for name, value in stored.items() if value is not None}
    else:  # what a conversion of the same config would write: that says nothing about where a tensor goes
        config = {**config, "tie_word_embeddings": checkpoint.dims.tied}
        try:
            args = checkpoint.family.megatron_args(config, checkpoint.steps, checkpoint.repeated)
        except ConfigError as error:
            raise ValueError(f"no training arguments are stored, and config.json does not fix them: {error}") from error
    settings = config_from({"vocab_size": config.get("vocab_size"), **args})
    build = partial(runnable, checkpoint.stored, settings, unmapped=checkpoint.unmapped)
    return ModelSide(facts_of(checkpoint, "mtp-convert's Megatron tree"), build)


def config_from(args: Mapping[str, Any]) -> TransformerConfig:
    """The settings of a whole model from training arguments, `vocab_size` being the vocabulary without padding."""
    size = args.get("vocab_size")
    return TransformerConfig.from_megatron_args(args, **_ONE_STAGE, **({"vocab_size": size} if size else {}))


def runnable(
    stored: Stored, config: TransformerConfig, dtype: torch.dtype, *, unmapped: Collection[str] = ()
) -> Runnable:
    """The model of these settings over a checkpoint; ValueError unless they fit. `unmapped` tensors do not count."""
    config = replace(config, params_dtype=dtype, mtp_experts=mtp_experts(stored.tensors))
    with torch.device("meta"):
        model: LanguageModel = (GPTModel if config.hybrid is None else HybridModel)(config)
    model.eval()
    layers, steps, depths = len(model.decoder.layers), config.mtp_num_layers or 0, config.mtp_stored_layers
    prefixes = {"embedding": "embedding", "decoder": "final_norm", "output_layer": "logits"}
    prefixes |= {f"decoder.layers.{i}": f"layers.{i}" for i in range(layers)}
    for d in range(depths):
        prefixes |= {f"mtp.layers.{d}.{part}": f"mtp.{d}.fused" for part in _FUSION}
        prefixes[f"mtp.layers.{d}"] = f"mtp.{d}.block"

    def drive(ids: Tensor) -> None:
        for hidden in model.hidden_states(ids).chunk(1 + steps):
            model.logits(hidden)

    return Runnable(
        root=model,
        layers=layers,
        steps=steps,
        points=tuple(_points(model, steps, depths, dtype)),
        groups=grouped(slots(model), prefixes),
        order=order_of(layers, [k % depths for k in range(steps)]),
        weights=MegatronWeights(model, stored, unmapped),
        form=SequenceFirst(),
        drive=drive,
        guides={f"layers.{i}": f"layers.{j}" for i in range(layers) if (j := config.indexing_layer(i)) != i},
    )


def _points(model: LanguageModel, steps: int, depths: int, dtype: torch.dtype) -> Iterator[Point]:
    """Where the places are. Every MTP layer runs at step d, d + depths, ..."""
    size, decoder = model.config.hidden_size, model.decoder
    head = "embedding" if model.config.share_embeddings_and_output_weights else "logits"

    def nothing_embedded(ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.T.shape, size, dtype=dtype, device=ids_BS.device)

    def one_stream(hidden: Tensor) -> Tensor:
        return hidden[..., :size]

    embedded = (Call("embedding", enters=False), *(Call(f"mtp.{k}.fused", False, False) for k in range(steps)))
    yield Point(model.embedding, embedded, "embedding", hidden="input_ids", skipped=nothing_embedded)
    for i, layer in enumerate(decoder.layers):
        yield Point(layer, (Call(f"layers.{i}"),), f"layers.{i}")
    yield Point(decoder, (Call("final_norm"),), "final_norm", "finish", skipped=one_stream)
    scored = (Call("logits"), *(Call(f"mtp.{k}.logits") for k in range(steps)))
    yield Point(model, scored, head, "logits")
    for d in range(depths if steps else 0):
        layer, runs, group = model.mtp.layers[d], range(d, steps, depths), f"mtp.{d}.block"
        inner = layer.get_submodule(model.config.mtp_inner_name)
        yield Point(layer, tuple(Call(f"mtp.{k}.fused") for k in runs), f"mtp.{d}.fused", "_concat_embeddings")
        yield Point(inner, tuple(Call(f"mtp.{k}.block", leaves=False) for k in runs), group)
        ends = tuple(Call(f"mtp.{k}.block", enters=False) for k in runs)
        yield Point(layer, ends, group, "_postprocess", skipped=one_stream)
