"""The Megatron side with nothing of ours in it: the installed Megatron-Core runs the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.models.megatron.loading import mtp_experts
from mtp_convert.verify.megatron_core_model import build, engine_installed, layer_pattern, missing_for, one_process
from mtp_convert.verify.megatron_core_weights import CoreWeights
from mtp_convert.verify.model_side import ModelSide, Runnable, facts_of, order_of
from mtp_convert.verify.residency import grouped, slots
from mtp_convert.verify.side import Tap
from mtp_convert.verify.watch import Call, Point, SequenceFirst

OLDEST = (0, 19)  # release of Megatron-Core whose modules have the names below
_CPU = torch.device("cpu")
_FUSION = ("enorm", "hnorm", "eh_proj")


class MegatronCoreSide:
    """See Side. Every run is a job of one process of its own, which ends with it.

    Raises:
        ConvertError: MTP032 a package is missing, or Megatron-Core refuses the model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._engine = _engine_for(checkpoint)
        specs = "TransformerEngine" if self._engine else "local"
        self.facts = facts_of(checkpoint, f"megatron-core {version('megatron-core')}, {specs} specs")
        with self._model(_CPU) as model:
            self._places = model.places()
            self._tensors = {place: model.tensors(place) for place in self._places}

    def places(self) -> tuple[str, ...]:
        """See Side."""
        return self._places

    def tensors(self, place: str) -> tuple[str, ...]:
        """See Side; KeyError for a place that the model has not."""
        return self._tensors[place]

    def run(
        self,
        ids: Tensor,
        tap: Tap,
        *,
        dtype: torch.dtype,
        device: torch.device,
        streamed: bool,
        only: Collection[str] | None = None,
    ) -> None:
        """See Side. ConvertError: MTP032 if Megatron-Core cannot run it so, such as TransformerEngine in float64."""
        with self._model(device) as model:
            model.run(ids, tap, dtype=dtype, device=device, streamed=streamed, only=only)

    @contextmanager
    def _model(self, device: torch.device) -> Iterator[ModelSide]:
        """The model within its job; what Megatron-Core says against it becomes one error."""
        try:
            with one_process(device):
                make = partial(_runnable, self._checkpoint, engine=self._engine, device=device)
                yield ModelSide(self.facts, make)
        except (ValueError, OSError, ConvertError):
            raise
        except Exception as error:  # of foreign code: an assertion, a missing package, a kernel that is not there
            what = f"{self.facts.backend} cannot run it: {type(error).__name__}: {error}"
            hint = "" if self._engine else "pip install transformer-engine: its layers know more models"
            raise ConvertError("MTP032", Problem(what, self._checkpoint.located.given.name), hint=hint) from error


def _engine_for(checkpoint: Checkpoint) -> bool:
    """Whether TransformerEngine's layers run a checkpoint; ConvertError names packages that are missing."""
    where, args = checkpoint.located.given.name, _arguments(checkpoint)
    try:
        release = version("megatron-core")
        if tuple(map(int, release.split(".")[:2])) < OLDEST:
            raise ImportError(f"it is {release}, and {'.'.join(map(str, OLDEST))} is the oldest that is known here")
        engine = engine_installed() and args.get("transformer_impl") != "local"
    except Exception as error:  # of foreign code, which may lack a package, a driver or a kernel
        needed = error.name if isinstance(error, ModuleNotFoundError) else None
        what = f"the backend megatron-core cannot be imported: {error}"
        hint = f"pip install {(needed or 'megatron-core').replace('_', '-')}"
        raise ConvertError("MTP032", Problem(what, where), hint=hint) from error
    if missing := missing_for(layer_pattern(args), engine=engine):
        problem = Problem(f"a hybrid model of Megatron-Core needs {' and '.join(missing)}", where)
        raise ConvertError("MTP032", problem, hint=f"pip install {' '.join(missing)}, on a machine with a CUDA device")
    return engine


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """Training arguments that say something; ValueError if the checkpoint carries none."""
    args = checkpoint.stored.arguments.get("args")
    if not isinstance(args, dict) or not args:
        raise ValueError("the checkpoint carries no training arguments, and Megatron-Core is built from those")
    return {name: value for name, value in args.items() if value is not None}


def _runnable(checkpoint: Checkpoint, dtype: torch.dtype, *, engine: bool, device: torch.device) -> Runnable:
    """The model of a checkpoint on the meta device; ValueError unless they fit."""
    stored, args = checkpoint.stored, _arguments(checkpoint)
    vocab = args.get("vocab_size") or checkpoint.model_config.get("vocab_size") or args["padded_vocab_size"]
    experts = mtp_experts(stored.tensors)
    model: Any = build(args, dtype, device, engine=engine, vocab=vocab, mtp_experts=experts).eval()
    _forget(model, dtype)
    _keep_up(model)
    layers, steps = len(model.decoder.layers), model.config.mtp_num_layers or 0
    depths = len(model.mtp.layers) if steps else 0
    prefixes = {"embedding": "embedding", "decoder": "final_norm", "output_layer": "logits"}
    prefixes |= {f"decoder.layers.{i}": f"layers.{i}" for i in range(layers)}
    for d in range(depths):
        prefixes |= {f"mtp.layers.{d}.{part}": f"mtp.{d}.fused" for part in _FUSION}
        prefixes[f"mtp.layers.{d}"] = f"mtp.{d}.block"
    head = _Head(model)

    def drive(ids: Tensor) -> None:
        model.post_process = False  # give the hidden states of all steps, and no loss
        length = ids.shape[1]
        positions = torch.arange(length, device=ids.device).expand(ids.shape).contiguous()
        later = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)
        for hidden in model(ids, positions, later).chunk(1 + steps):
            head(hidden)

    return Runnable(
        root=model,
        layers=layers,
        steps=steps,
        points=tuple(_points(model, head, steps, depths, dtype)),
        groups=grouped(slots(model), prefixes),
        order=order_of(layers, [k % depths for k in range(steps)]),
        weights=CoreWeights(model, stored, checkpoint.unmapped),
        form=SequenceFirst(),
        drive=drive,
        guides=_guides(model.config),
    )


class _Head(nn.Module):
    """The output layer with the weight that it has when it runs: its own, or the embedding's."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - Megatron-Core's type
        super().__init__()
        self.model = model

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Logits [S, B, V]."""
        model = self.model
        tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits: Tensor = model._scale_logits(model.output_layer(hidden_SBH, weight=tied)[0])
        return logits


def _forget(model: nn.Module, dtype: torch.dtype) -> None:
    """Tensors of the model without memory; norms of torch, which know no `params_dtype`, in `dtype`."""
    for slot in slots(model).values():
        is_norm = isinstance(slot.module, nn.RMSNorm | nn.LayerNorm)
        slot.put(torch.empty_like(slot.tensor, device="meta", dtype=dtype if is_norm else None))


def _keep_up(model: nn.Module) -> None:
    """Mamba mixers hold their parameters a second time, in a helper: it shall have those of the moment."""

    def refresh(mixer: Any, _: object) -> None:  # noqa: ANN401 - Megatron-Core's type
        for name in ("conv1d_weight", "conv1d_bias", "dt_bias", "A_log", "D"):
            setattr(mixer.cp, f"{name}_cp1", getattr(mixer, name))

    for module in model.modules():
        if hasattr(getattr(module, "cp", None), "A_log_cp1"):
            module.register_forward_pre_hook(refresh)


def _points(model: Any, head: _Head, steps: int, depths: int, dtype: torch.dtype) -> Iterator[Point]:  # noqa: ANN401
    """Where the places are. Every MTP layer runs at step d, d + depths, ..."""
    size, decoder = model.config.hidden_size, model.decoder
    weight = "embedding" if model.share_embeddings_and_output_weights else "logits"

    def nothing_embedded(ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.T.shape, size, dtype=dtype, device=ids_BS.device)

    embedded = (Call("embedding", enters=False), *(Call(f"mtp.{k}.fused", False, False) for k in range(steps)))
    yield Point(model.embedding, embedded, "embedding", hidden="input_ids", skipped=nothing_embedded)
    for i, layer in enumerate(decoder.layers):
        yield Point(layer, (Call(f"layers.{i}"),), f"layers.{i}", skipped=_with_context)
    norm = decoder.final_norm if hasattr(decoder, "final_norm") else decoder.final_layernorm
    yield Point(norm, (Call("final_norm"),), "final_norm")
    yield Point(head, (Call("logits"), *(Call(f"mtp.{k}.logits") for k in range(steps))), weight)
    for d in range(depths):
        layer, runs, group = model.mtp.layers[d], range(d, steps, depths), f"mtp.{d}.block"
        skipped = _with_context if layer.mtp_layer_pattern is None else _alone
        starts = tuple(Call(f"mtp.{k}.block", leaves=False) for k in runs)
        yield Point(layer, tuple(Call(f"mtp.{k}.fused") for k in runs), f"mtp.{d}.fused", "_concat_embeddings")
        yield Point(layer.mtp_model_layer, starts, group, skipped=skipped)
        yield Point(layer, tuple(Call(f"mtp.{k}.block", enters=False) for k in runs), group, "_postprocess")


def _alone(hidden: Tensor) -> Tensor:
    return hidden


def _with_context(hidden: Tensor) -> tuple[Tensor, None]:
    """What a TransformerLayer gives: its output, and what it has of an encoder."""
    return hidden, None


def _guides(config: Any) -> dict[str, str]:  # noqa: ANN401 - Megatron-Core's TransformerConfig
    """Layers of sparse attention that see the keys which another layer's indexer chose."""
    freq = getattr(config, "dsa_indexer_topk_freq", 1)
    if config.experimental_attention_variant != "dsa" or freq == 1:
        return {}
    from megatron.core.transformer.experimental_attention_variant.dsa import source_dsa_compute_layer

    skipped = config.dsa_indexer_skip_topk_offset
    sources = {i: source_dsa_compute_layer(i + 1, skipped, freq) - 1 for i in range(config.num_layers)}
    return {f"layers.{i}": f"layers.{j}" for i, j in sources.items() if i != j}
