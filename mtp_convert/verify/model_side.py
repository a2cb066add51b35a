"""A side that runs a module tree: the same for every model, in memory as a whole or stage by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.verify.residency import Residency, Weights
from mtp_convert.verify.result import SideFacts
from mtp_convert.verify.side import Tap
from mtp_convert.verify.watch import Form, Point, Watch


@dataclass(frozen=True)
class Runnable:
    """A model on the meta device (buffers that no checkpoint holds aside), and all that is needed to run it.

    layers, steps: how many decoder layers and MTP depths run. points: where its places are. groups: names of its
    tensors by the place whose weights they are. order: the groups as they will be needed. weights: what the tensors are
    made of. drive: runs everything on token ids [B, S]. guides: places that need more of another than a hidden state
    (which keys to look at), and that other place.
    """

    root: nn.Module
    layers: int
    steps: int
    points: tuple[Point, ...]
    groups: Mapping[str, Collection[str]]
    order: tuple[str, ...]
    weights: Weights
    form: Form
    drive: Callable[[Tensor], object]
    guides: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> tuple[str, ...]:
        """Every place, each behind those that it needs."""
        heads = [f"mtp.{k}.{part}" for k in range(self.steps) for part in ("fused", "block", "logits")]
        return ("embedding", *(f"layers.{i}" for i in range(self.layers)), "final_norm", "logits", *heads)

    def groups_at(self, place: str) -> frozenset[str]:
        """The groups of weights that a place needs."""
        return frozenset(p.group for p in self.points if any(call.place == place for call in p.calls))


class ModelSide:
    """See Side. `build` makes the model in a dtype; ValueError if it cannot."""

    def __init__(self, facts: SideFacts, build: Callable[[torch.dtype], Runnable]) -> None:
        self.facts = facts
        self._built = cache(build)  # without memory for weights, so it may stay
        self._model = self._built(torch.float32)

    def places(self) -> tuple[str, ...]:
        """See Side."""
        return self._model.places

    def tensors(self, place: str) -> tuple[str, ...]:
        """See Side; KeyError for a place that the model has not."""
        if place not in self.places():
            raise KeyError(place)
        model = self._model
        names = [name for group in model.groups_at(place) for name in model.groups[group]]
        return tuple(sorted({source for name in names for source in model.weights.sources(name)}))

    @torch.no_grad()
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
        """See Side."""
        model = self._built(dtype)
        _move_buffers(model.root, device)
        if only is not None:
            only = {*only, *(model.guides[place] for place in only if place in model.guides)}
        wanted = {g for place in model.places if only is None or place in only for g in model.groups_at(place)}
        order = [group for group in model.order if group in wanted]
        with (
            exact_float32(),
            Residency(
                model.root, model.groups, model.weights, device=device, streamed=streamed, order=order
            ) as residency,
            Watch(tap, model.form, residency.need, only).over(model.points),
        ):
            model.drive(ids.to(device))


def order_of(layers: int, depths: Collection[int]) -> tuple[str, ...]:
    """Groups as they are needed, the head once, at the end; `depths` are the stored ones in the order they run."""
    heads = [group for k in depths for group in ("embedding", f"mtp.{k}.fused", f"mtp.{k}.block")]
    return ("embedding", *(f"layers.{i}" for i in range(layers)), "final_norm", *heads, "logits")


def facts_of(checkpoint: Checkpoint, backend: str) -> SideFacts:
    """What is known about a side before it runs."""
    stored = checkpoint.stored
    return SideFacts(
        path=str(checkpoint.located.given),
        family=checkpoint.family.name,
        layout=checkpoint.layout.name,
        container=stored.container,
        dtypes=dict(Counter(t.dtype.name for t in stored.in_files.values()).most_common()),
        backend=backend,
    )


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies, go where the weights will be."""
    for module in root.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 matrices in float32 on every device: TF32 keeps 10 bits of 23."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
