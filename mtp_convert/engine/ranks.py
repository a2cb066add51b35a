"""Lays a plan out as a legacy Megatron checkpoint: one `torch.save` file per rank. No byte is moved here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from mtp_convert.containers.base import StoredTensor
from mtp_convert.containers.megatron_legacy import FILE
from mtp_convert.containers.pickle_write import Pairs, dumps
from mtp_convert.containers.torch_save import archive, plain, tensor
from mtp_convert.encodings.dtype import BY_NAME
from mtp_convert.engine.files import Extent, Literal, OutFile
from mtp_convert.engine.sinks import Output, OutTensor
from mtp_convert.sharding.deal import Part, RankContent

STATE = BY_NAME["U8"]  # what TransformerEngine 2 stores for a module without FP8 state is empty and of this type


def legacy_output(
    contents: Iterable[RankContent],
    tensors: Sequence[OutTensor],
    source: Mapping[str, StoredTensor],
    *,
    folder: str,
    common: Mapping[str, object],
) -> Output:
    """`folder/mp_rank_*/model_optim_rng.pt` of every rank; `common` is what all of them repeat (`args`, ...)."""
    by_name = {t.name: t for t in tensors}
    files = []
    for content in contents:
        extents = list(_extents(content.parts, by_name, source, common))
        files.append(OutFile(f"{folder}/{content.folder}/{FILE}", extents))
    return Output(tuple(files), {})


def _extents(
    parts: Sequence[Part],
    tensors: Mapping[str, OutTensor],
    source: Mapping[str, StoredTensor],
    common: Mapping[str, object],
) -> Iterator[Extent]:
    """The file of a rank: a storage per tensor, and one without bytes for all states."""
    held = [(h, tensors[h.tensor]) for part in parts for h in part.held]
    payloads = [prod(h.shape) * t.dtype.itemsize for h, t in held]
    models: dict[str, object] = {}
    number = 0
    for part in parts:
        records = {h.name: tensor(tensors[h.tensor].dtype, h.shape, number + i) for i, h in enumerate(part.held)}
        number += len(part.held)
        states = {name: None if none else tensor(STATE, (0,), len(held)) for name, none in part.states}
        models[part.key] = Pairs({**records, **states}.items())
    structure = dumps(Pairs([*((k, plain(v)) for k, v in common.items()), *models.items()]))
    gaps = archive(structure, [*payloads, 0])
    for gap, (h, out) in zip(gaps, held, strict=False):
        yield Literal(gap)
        yield from (out.extent(source, offset, sizes) for offset, sizes in h.boxes)
    yield Literal(b"".join(gaps[len(held) :]))
