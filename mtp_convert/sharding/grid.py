"""The files of all ranks, arranged by their place, and the names that tensors have in them.

Every rank counts its decoder layers and its experts from zero: chunk c of the model holds some of the layers, expert
rank r holds E / expert experts from r * E / expert on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from mtp_convert.containers.megatron_legacy import RankFile
from mtp_convert.containers.torch_zip import TensorBytes
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.layout import Binding, Template
from mtp_convert.sharding.sizes import Rank, Sizes


def expert_share(template: Template, sizes: Sizes) -> tuple[int | None, dict[str, int]]:
    """The expert rank that holds a tensor (None: all of them), and the expert's number there.

    The last ranks hold nothing where the experts do not divide; such sizes are refused elsewhere.
    """
    if "e" not in template.at:
        return None, {}
    share = -(-template.counts["e"] // sizes.expert)
    return template.at["e"] // share, {"e": template.at["e"] % share}


@dataclass(frozen=True)
class Grid:
    """A complete set of ranks. layers: the decoder layers of every chunk."""

    sizes: Sizes
    files: Mapping[Rank, RankFile]
    layers: tuple[range, ...]

    def ranks(self, chunk: int, expert: int | None) -> Iterator[Rank]:
        """The ranks that hold a chunk, of one expert rank or of all, in order of their tensor rank."""
        stage = chunk % self.sizes.pipeline
        return (r for r in self.files if r.pipeline == stage and expert in (None, r.expert))

    def models(self, chunk: int, expert: int | None) -> Iterator[tuple[Rank, Mapping[str, TensorBytes]]]:
        """What those ranks hold of the chunk, by local name."""
        key = self.sizes.key(chunk)
        return ((rank, self.files[rank].models.get(key, {})) for rank in self.ranks(chunk, expert))

    @cached_property
    def _chunk_of(self) -> dict[int, int]:
        return {layer: c for c, layers in enumerate(self.layers) for layer in layers}

    @cached_property
    def _first(self) -> dict[tuple[int, int | None], Mapping[str, TensorBytes]]:
        """What the first rank of every chunk and expert rank holds."""
        experts = (None, *range(self.sizes.expert))
        return {(c, e): next(self.models(c, e))[1] for c in range(self.sizes.chunks) for e in experts}

    def spots(self, template: Template) -> Iterator[tuple[int, str]]:
        """The chunks that store a tensor, and its name there; the ends of the model may lie on several."""
        expert, local = expert_share(template, self.sizes)
        if "i" in template.at:
            chunk = self._chunk_of.get(template.at["i"])
            candidates: Iterable[int] = () if chunk is None else (chunk,)
            local["i"] = template.at["i"] - self.layers[chunk or 0].start
        else:
            candidates = range(self.sizes.chunks)
        name = template.name(**local)
        return ((c, name) for c in candidates if name in self._first[c, expert])

    def holds(self, binding: Binding) -> bool:
        """Whether a tensor is stored."""
        return any(True for _ in self.spots(binding.template))

    def shares(self, binding: Binding, chunk: int, name: str) -> Iterator[tuple[int, int, Rank, TensorBytes | None]]:
        """Every rank's share of a tensor on a chunk: its number, of how many, the rank, and where it lies."""
        expert, _ = expert_share(binding.template, self.sizes)
        n = self.sizes.tensor if expert is None else self.sizes.expert_tensor
        for rank, model in self.models(chunk, expert):
            yield rank.tensor % n, n, rank, model.get(name)


def arrange(files: Mapping[str, RankFile], sizes: Sizes, heads: Iterable[str]) -> Grid:
    """Put the files of all ranks in their places.

    Args:
        heads: what stands before the number of a decoder layer in tensor names, in every spelling.

    Raises:
        ConvertError: MTP016 when ranks disagree on virtual pipeline stages, or ranks of a stage on their layers.
    """
    keys = {name: tuple(sorted(f.models)) for name, f in files.items()}
    virtual = max(map(len, keys.values()))
    sizes = replace(sizes, virtual=virtual)
    wanted = tuple(sorted({sizes.key(c) for c in range(sizes.chunks)}))
    if odd := {name: k for name, k in keys.items() if k != wanted}:
        problems = [Problem("model entries", n, ", ".join(k), ", ".join(wanted)) for n, k in odd.items()]
        raise ConvertError("MTP016", problems)
    ranks = [r for r in sizes.ranks() if sizes.folder(r) in files]
    grid = Grid(sizes, {r: files[sizes.folder(r)] for r in ranks}, ())
    counts = []
    heads = tuple(heads)
    for chunk in range(sizes.chunks):
        found = {rank: _layers(model, heads) for rank, model in grid.models(chunk, None)}
        if len(set(found.values())) > 1:
            got = [Problem("decoder layers", sizes.folder(rank), str(n)) for rank, n in found.items()]
            raise ConvertError("MTP016", got)
        counts.append(next(iter(found.values())))
    starts = accumulate(counts, initial=0)
    return replace(grid, layers=tuple(range(s, s + n) for s, n in zip(starts, counts, strict=False)))


def _layers(names: Iterable[str], heads: tuple[str, ...]) -> int:
    """How many decoder layers a chunk holds: numbered from zero without a gap."""
    names = tuple(names)
    most = 0
    for head in heads:
        numbers = {name[len(head) :].partition(".")[0] for name in names if name.startswith(head)}
        count = 0
        while str(count) in numbers:
            count += 1
        most = max(most, count)
    return most
