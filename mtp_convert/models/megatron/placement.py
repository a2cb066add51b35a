"""Which pipeline stage holds which layers, the MTP layers above all.

Without a layout all MTP layers sit on the last stage, behind the decoder layers. A layout states every stage by hand,
and may give the MTP layers a stage to themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Protocol, Self

from mtp_convert.models.megatron.groups import current_groups


class LayerType(Enum):
    """What can stand in a stage; the value is its letter in a layout string."""

    embedding = "E"
    loss = "L"
    encoder = "e"
    decoder = "t"
    mtp = "m"


_LETTERS = {kind.value: kind for kind in LayerType if kind is not LayerType.encoder}
Stage = tuple[LayerType, ...]


@dataclass(frozen=True)
class PipelineParallelLayerLayout:
    """`layout[p][v]` lists the layers of virtual stage v on pipeline rank p; layers run stage by stage, v slowest."""

    layout: tuple[tuple[Stage, ...], ...]

    @classmethod
    def from_str(cls, layout: str, pipeline_model_parallel_size: int) -> Self:
        """Parse such as `"Ettt|(tt|)*29,m|L"`: E embedding, t decoder, m MTP, L loss, `|` between stages.

        `*n` repeats the letter, bar or group in parentheses before it; commas and spaces are decoration. ValueError for
        anything else, and when the stages do not divide among the ranks.
        """
        stages = "".join(_expand(layout)).split("|")
        return cls.from_stages([[_LETTERS[c] for c in stage] for stage in stages], pipeline_model_parallel_size)

    @classmethod
    def from_stages(cls, stages: Sequence[Sequence[LayerType | str]], pipeline_model_parallel_size: int) -> Self:
        """Stages in running order, as layer types or their names; ValueError for unknown names or uneven stages."""
        size = pipeline_model_parallel_size
        names = [[k.name if isinstance(k, LayerType) else k.strip().lower() for k in stage] for stage in stages]
        unknown = sorted({n for stage in names for n in stage} - set(LayerType.__members__))
        if unknown:
            raise ValueError(f"unknown layers {unknown}; known are {list(LayerType.__members__)}")
        if size < 1 or not stages or len(stages) % size:
            raise ValueError(f"{len(stages)} stages do not divide among {size} pipeline ranks")
        kinds = [tuple(LayerType[n] for n in stage) for stage in names]
        return cls(tuple(tuple(kinds[rank::size]) for rank in range(size)))

    @property
    def pipeline_model_parallel_size(self) -> int:
        """Number of pipeline ranks."""
        return len(self.layout)

    @property
    def virtual_pipeline_model_parallel_size(self) -> int:
        """Number of virtual stages per rank, 1 or more."""
        return len(self.layout[0])

    @cached_property
    def flatten_layout(self) -> Stage:
        """All layers in running order."""
        return tuple(kind for stage in self._stages for kind in stage)

    @property
    def _stages(self) -> Iterator[Stage]:
        return (stage for virtual in zip(*self.layout, strict=True) for stage in virtual)

    def validate_layer_layout(self, num_layers: int, mtp_num_layers: int | None) -> bool:
        """Whether the MTP layers have a stage that is not the last rank's.

        ValueError, naming everything wrong, unless: embedding first and loss last, each once; the layer counts are
        those of the model; no decoder layer behind an MTP layer; all MTP layers in one stage, the last virtual one of
        its rank; no encoder layers.
        """
        problems = [
            *self._wrong_order(),
            *self._wrong_counts(num_layers, mtp_num_layers or 0),
            *self._wrong_mtp_stage(),
        ]
        if problems:
            raise ValueError(f"pipeline layout: {'; '.join(problems)}")
        return any(LayerType.mtp in stage for rank in self.layout[:-1] for stage in rank)

    def _wrong_order(self) -> Iterator[str]:
        flat = self.flatten_layout
        if flat[:1] != (LayerType.embedding,) or flat[-1:] != (LayerType.loss,):
            yield "the first layer must be the embedding and the last the loss"
        if LayerType.mtp in flat and LayerType.decoder in flat[flat.index(LayerType.mtp) :]:
            yield "decoder layers behind MTP layers"

    def _wrong_counts(self, num_layers: int, mtp_num_layers: int) -> Iterator[str]:
        expected = {
            LayerType.embedding: 1,
            LayerType.loss: 1,
            LayerType.decoder: num_layers,
            LayerType.mtp: mtp_num_layers,
            LayerType.encoder: 0,
        }
        for kind, count in expected.items():
            if (found := self.flatten_layout.count(kind)) != count:
                yield f"{found} {kind.name} layers, expected {count}"

    def _wrong_mtp_stage(self) -> Iterator[str]:
        holding = [stage for stage in self._stages if LayerType.mtp in stage]
        if len(holding) > 1:
            yield f"MTP layers in {len(holding)} stages, expected one"
        if any(LayerType.mtp in stage for rank in self.layout for stage in rank[:-1]):
            yield "MTP layers before the last virtual stage of a rank"

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers of a type on a stage; `pp_rank` defaults to this process's, `vp_stage` to the only one."""
        rank, virtual = self._at(vp_stage, pp_rank)
        return self.layout[rank][virtual].count(layer_type)

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers of a type on all stages before this one."""
        rank, virtual = self._at(vp_stage, pp_rank)
        before = list(self._stages)[: virtual * self.pipeline_model_parallel_size + rank]
        return sum(stage.count(layer_type) for stage in before)

    def get_layer_id_list(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> list[int]:
        """Numbers, from 0 for the first of the model, of the layers of a type on a stage."""
        offset = self.get_layer_offset(layer_type, vp_stage, pp_rank)
        return list(range(offset, offset + self.get_num_layers_to_build(layer_type, vp_stage, pp_rank)))

    def _at(self, vp_stage: int | None, pp_rank: int | None) -> tuple[int, int]:
        rank = _pp_rank(self.pipeline_model_parallel_size, pp_rank)
        return rank, _vp_stage(vp_stage, self.virtual_pipeline_model_parallel_size)


class PlacementConfig(Protocol):
    """What a TransformerConfig says about stages."""

    @property
    def mtp_num_layers(self) -> int | None:
        """MTP depths, None without MTP."""

    @property
    def pipeline_model_parallel_size(self) -> int:
        """Number of pipeline ranks."""

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        """Virtual stages per rank, None when there is one."""

    @property
    def pipeline_model_parallel_layout(self) -> PipelineParallelLayerLayout | str | None:
        """Stages stated by hand."""


def mtp_on_this_rank(
    layout: PipelineParallelLayerLayout | None = None,
    mtp_num_layers: int | None = None,
    ignore_virtual: bool = True,
    vp_stage: int | None = None,
) -> bool:
    """Whether this process holds MTP layers: on any of its virtual stages, or on `vp_stage` unless `ignore_virtual`."""
    groups = current_groups()
    if layout is None:
        if mtp_num_layers is None or groups.pp.rank() != groups.pp.size() - 1:
            return False
        virtual = groups.vp_size or 1
        return ignore_virtual or _vp_stage(vp_stage, virtual) == virtual - 1
    stages = layout.layout[_pp_rank(layout.pipeline_model_parallel_size)]
    if not ignore_virtual:
        stages = (stages[_vp_stage(vp_stage, len(stages))],)
    return any(LayerType.mtp in stage for stage in stages)


def get_mtp_ranks(pp_ranks: Sequence[int], config: PlacementConfig) -> list[int]:
    """The global ranks that hold MTP layers, of the pipeline `pp_ranks`."""
    if config.mtp_num_layers is None:
        return []
    layout = _layout(config)
    if layout is None:
        return [pp_ranks[-1]]
    holding = (any(LayerType.mtp in stage for stage in stages) for stages in layout.layout)
    return [rank for rank, holds in zip(pp_ranks, holding, strict=True) if holds]


def get_mtp_layer_offset(config: PlacementConfig, vp_stage: int | None = None) -> int:
    """Number of MTP layers on stages before this process's: 0 unless a layout places them earlier."""
    layout = _layout(config)
    if layout is None or config.pipeline_model_parallel_size == 1:
        return 0
    return layout.get_layer_offset(LayerType.mtp, vp_stage)


def get_mtp_num_layers_to_build(
    config: PlacementConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> int:
    """MTP layers on a stage: all of the model's or none. `pp_rank` defaults to this process's.

    ValueError if a layout spreads them over stages.
    """
    total, layout = config.mtp_num_layers or 0, _layout(config)
    if layout is None:
        last = config.pipeline_model_parallel_size - 1
        virtual = config.virtual_pipeline_model_parallel_size or 1
        here = (_pp_rank(last + 1, pp_rank), _vp_stage(vp_stage, virtual))
        return total if here == (last, virtual - 1) else 0
    count = layout.get_num_layers_to_build(LayerType.mtp, vp_stage, pp_rank)
    if count not in (0, total):
        raise ValueError(f"the layout puts {count} of {total} MTP layers on one stage, expected all or none")
    return count


def _layout(config: PlacementConfig) -> PipelineParallelLayerLayout | None:
    layout = config.pipeline_model_parallel_layout
    if isinstance(layout, str):
        return PipelineParallelLayerLayout.from_str(layout, config.pipeline_model_parallel_size)
    return layout


def _pp_rank(size: int, given: int | None = None) -> int:
    """The rank given or this process's; ValueError if it is none of a pipeline of `size` ranks."""
    group = current_groups().pp
    if given is None and group.size() != size:
        raise ValueError(f"the model has {size} pipeline ranks, this process is in a pipeline group of {group.size()}")
    rank = group.rank() if given is None else given
    if not 0 <= rank < size:
        raise ValueError(f"pp_rank must be 0 to {size - 1}, got {rank}")
    return rank


def _vp_stage(vp_stage: int | None, size: int) -> int:
    if size == 1:
        return 0
    if vp_stage is None or not 0 <= vp_stage < size:
        raise ValueError(f"vp_stage must be 0 to {size - 1} with {size} virtual pipeline stages, got {vp_stage}")
    return vp_stage


def _expand(text: str) -> Iterator[str]:
    """The letters and bars of a layout string, repetitions written out."""
    items: list[list[str]] = [[]]  # one list per open parenthesis; every item can be repeated
    rest = text.replace(",", "").replace(" ", "")
    while rest:
        letter, rest = rest[0], rest[1:]
        if letter == "(":
            items.append([])
        elif letter == ")" and len(items) > 1:
            group = "".join(items.pop())
            items[-1].append(group)
        elif letter == "*" and items[-1] and rest[:1].isdecimal():
            digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
            items[-1][-1] *= int(digits)
            rest = rest[len(digits) :]
        elif letter in _LETTERS or letter == "|":
            items[-1].append(letter)
        else:
            raise ValueError(f"pipeline layout {text!r}: {letter!r} is out of place; letters are {', '.join(_LETTERS)}")
    if len(items) > 1:
        raise ValueError(f"pipeline layout {text!r}: a parenthesis is not closed")
    return iter(items[0])
