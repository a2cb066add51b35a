"""From the shares of all ranks to whole tensors: every share becomes boxes of one stored tensor.

What several ranks must hold alike is taken from the first of them; the others are kept as replicas, to be compared
before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mtp_convert.containers.base import Stored, StoredChunk, StoredTensor
from mtp_convert.containers.megatron_legacy import RankFile
from mtp_convert.containers.torch_zip import TensorBytes
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.family import Dims, Family, Names
from mtp_convert.mapping.layout import Binding, Layout
from mtp_convert.mapping.rules import Param
from mtp_convert.sharding.cuts import Cut, cut_of
from mtp_convert.sharding.grid import Grid, arrange
from mtp_convert.sharding.packed import unpacked
from mtp_convert.sharding.sizes import Rank, Sizes, possible

Replica = tuple[StoredTensor, StoredTensor]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, as far as it is known before its layout is.

    names: the tensor names, or a question about them; stored: everything, once the layout is known.
    """

    names: Names
    arguments: Mapping[str, object]
    stored: Callable[[Layout], Stored]


def whole(stored: Stored) -> Contents:
    """A checkpoint whose tensors have their full names."""
    return Contents(frozenset(stored.tensors), stored.arguments, lambda layout: stored)


def sharded(files: Mapping[str, RankFile], folder: Path, family: Family, dims: Dims) -> Contents:
    """A checkpoint of ranks; where their folders allow several arrangements, the one that explains most.

    Raises:
        ConvertError: MTP016 when ranks are missing, too many, or disagree.
    """
    fixed = family.fixed("megatron", "legacy")
    found = grids(files, _heads(family, dims), _experts(family.layout("megatron", dims)))
    best = found[0]
    if len(found) > 1:
        best = max(found, key=lambda g: fitting(g, family.fit("megatron", dims, g.holds, fixed)))
    arguments = next(iter(files.values())).arguments
    return Contents(best.holds, arguments, lambda layout: assemble(best, layout, folder))


def _experts(layout: Layout) -> int:
    """The experts of a mixture; 0 where there are none, or not everywhere as many."""
    counts = {b.template.counts["e"] for b in layout.bindings.values() if "e" in b.template.counts}
    return counts.pop() if len(counts) == 1 else 0


def _heads(family: Family, dims: Dims) -> set[str]:
    """What stands before the number of a decoder layer in every spelling of the Megatron layout."""
    prefix = next(p.prefixes["megatron"] for p in family.places(dims) if "i" in p.at)
    head = prefix.partition("{i}")[0]
    words = [w for w in family.choices["megatron"] if f"{{{w}}}" in head]
    return {head.format_map(spelling) for spelling in family.spellings("megatron", dims, words)}


def grids(files: Mapping[str, RankFile], heads: Iterable[str], experts: int = 0) -> list[Grid]:
    """Every arrangement that the ranks' folders and layers allow, the likeliest first (see `sizes.possible`).

    Args:
        heads: what stands before the number of a decoder layer, in every spelling.
        experts: of a mixture, 0 where there is none.

    Raises:
        ConvertError: MTP016 when ranks are missing, too many, or disagree.
    """
    heads = tuple(heads)
    args = next(iter(files.values())).arguments.get("args")
    found, refusals = [], []
    for sizes in possible(files, args if isinstance(args, dict) else {}):
        try:
            share = experts // sizes.expert
            found.append(arrange(unpacked(files, share) if share else files, sizes, heads))
        except ConvertError as error:  # another meaning of the folders' numbers may fit
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found


def fitting(grid: Grid, layout: Layout) -> int:
    """How many tensors of a layout the ranks hold in the shapes that their sizes give."""
    return sum(any(_fits(grid, b, layout.params, *spot) for spot in grid.spots(b.template)) for b in _all(layout))


def _fits(grid: Grid, binding: Binding, params: Mapping[str, Param], chunk: int, name: str) -> bool:
    _, n, _, local = next(grid.shares(binding, chunk, name))
    cut = cut_of(binding, params)
    assert local is not None
    return binding.vocab or (cut.divides(n) and local.shape == cut.local(binding.shape, n))


def undivided(layout: Layout, sizes: Sizes) -> list[Problem]:
    """Numbers of experts that the expert-parallel size does not divide."""
    counts = {b.template.counts["e"] for b in layout.bindings.values() if "e" in b.template.at}
    expected = f"a multiple of the expert parallel size {sizes.expert}"
    return [Problem("experts", got=str(n), expected=expected) for n in sorted(counts) if n % sizes.expert]


def _all(layout: Layout) -> Iterator[Binding]:
    yield from layout.bindings.values()
    yield from map(layout.copy_binding, layout.copies)


def assemble(grid: Grid, layout: Layout, folder: Path) -> Stored:
    """The checkpoint as whole tensors under the names of `layout`; what it does not name keeps its rank in its name.

    Raises:
        ConvertError: MTP016 when ranks disagree, MTP024 when all agree on another shape than the config's.
    """
    if odd := undivided(layout, grid.sizes):
        raise ConvertError("MTP016", odd)
    made = _Assembly(grid, layout)
    for binding in _all(layout):
        made.add(binding)
    made.fail()
    files = grid.files.values()
    first = next(iter(files))
    sizes = grid.sizes
    return Stored(
        "legacy",
        folder,
        {**made.tensors, **made.others()},
        frozenset(f"{f.folder}/{name}" for f in files for name in f.states),
        frozenset(f"{f.folder}/{name}" for f in files for name in f.training),
        first.arguments,
        tuple(f.path for f in files),
        warnings=tuple(made.warnings),
        replicas=tuple(made.replicas),
        parallel={name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
    )


@dataclass
class _Assembly:
    """The whole tensors so far, and everything that was wrong on the way."""

    grid: Grid
    layout: Layout
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    replicas: list[Replica] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    used: set[tuple[int, str]] = field(default_factory=set)  # (chunk, local name)
    disagreeing: list[Problem] = field(default_factory=list)
    misshapen: list[Problem] = field(default_factory=list)

    def add(self, binding: Binding) -> None:
        """Put a tensor together from every chunk that stores it; the first one counts."""
        for chunk, name in self.grid.spots(binding.template):
            self.used.add((chunk, name))
            if binding.tensor in self.layout.copies and self._unused(binding, chunk):
                self.warnings.append(f"{name} of the last stage is not read: the model uses the embedding beside it")
                continue
            whole = self._whole(binding, chunk, name)
            if whole is None:
                continue
            own = self.tensors.setdefault(binding.tensor, whole)
            if own is whole:
                continue
            if (own.dtype, own.shape) != (whole.dtype, whole.shape):
                self._disagree(binding, name, f"{whole.dtype} {list(whole.shape)}", f"{own.dtype} {list(own.shape)}")
            else:
                self.replicas.append((own, whole))

    def _unused(self, copy: Binding, chunk: int) -> bool:
        """Whether a tied output layer lies beside an embedding on a later stage: Megatron allocates and ignores it."""
        own, _ = self.layout.home[self.layout.copies[copy.tensor]]
        return chunk > 0 and any(c == chunk for c, _ in self.grid.spots(own.template))

    def _whole(self, binding: Binding, chunk: int, name: str) -> StoredTensor | None:
        """One chunk's copy of a tensor, from the shares of its ranks."""
        shares = list(self.grid.shares(binding, chunk, name))
        if absent := [rank for _, _, rank, local in shares if local is None]:
            self.disagreeing += [Problem(f"{name} is not stored", self.grid.sizes.folder(rank)) for rank in absent]
            return None
        present = [(number, n, rank, local) for number, n, rank, local in shares if local is not None]
        _, n, _, first = present[0]
        for _, _, rank, local in present:
            if (local.dtype, local.shape) != (first.dtype, first.shape):
                where, got = self.grid.sizes.folder(rank), f"{local.dtype} {list(local.shape)}"
                self._disagree(binding, where, got, f"{first.dtype} {list(first.shape)}, as on the first rank")
                return None
        cut, shape = self._shape(binding, first, n)
        if cut.scattered(n):
            what = f"{name} is packed with other experts and cut over {n} ranks: no rank's share is one run of bytes"
            self.misshapen.append(Problem(what, self.grid.sizes.folder(present[0][2])))
            return None
        if not cut.divides(n) or first.shape != cut.local(shape, n):
            where = self.grid.sizes.folder(present[0][2])
            expected = f"{list(cut.local(shape, n))}, {'all' if cut.dim is None else f'1/{n}'} of {list(shape)}"
            self.misshapen.append(Problem(name, where, str(list(first.shape)), expected))
            return None
        return self._join(binding.tensor, cut, shape, present)

    def _shape(self, binding: Binding, local: TensorBytes, n: int) -> tuple[Cut, tuple[int, ...]]:
        """The cut and the whole shape; the rows of a vocabulary are what the ranks hold together."""
        if not binding.vocab or len(local.shape) != len(binding.shape):
            return cut_of(binding, self.layout.params), binding.shape
        rows = local.shape[0] * n
        args = self.grid.files[next(iter(self.grid.files))].arguments.get("args")
        told = args.get("padded_vocab_size") if isinstance(args, dict) else None
        if isinstance(told, int) and told != rows:
            self._disagree(binding, "args", f"padded_vocab_size {told}", f"{rows}, the rows of all ranks")
        return cut_of(binding, self.layout.params, rows), (rows, *binding.shape[1:])

    def _join(
        self, tensor: str, cut: Cut, shape: tuple[int, ...], shares: list[tuple[int, int, Rank, TensorBytes]]
    ) -> StoredTensor:
        """The first rank of every share makes the tensor; the others repeat it."""
        owners: dict[int, tuple[Rank, TensorBytes]] = {}
        chunks: list[StoredChunk] = []
        for number, n, rank, local in shares:
            number = 0 if cut.dim is None else number
            if number in owners:
                self.replicas.append((self._piece(tensor, *owners[number]), self._piece(tensor, rank, local)))
                continue
            owners[number] = rank, local
            start = local.start
            for offset, sizes in cut.boxes(shape, number, n):
                chunks.append(StoredChunk(offset, sizes, self.grid.files[rank].path, start))
                start += prod(sizes) * local.dtype.itemsize
        return StoredTensor(tensor, shares[0][3].dtype, shape, tuple(chunks))

    def _piece(self, tensor: str, rank: Rank, local: TensorBytes) -> StoredTensor:
        """A rank's share as a tensor of its own."""
        file = self.grid.files[rank]
        chunk = StoredChunk((0,) * len(local.shape), local.shape, file.path, local.start)
        return StoredTensor(f"{tensor} in {file.folder}", local.dtype, local.shape, (chunk,))

    def others(self) -> dict[str, StoredTensor]:
        """Tensors that the layout does not name."""
        found = {}
        for chunk in range(self.grid.sizes.chunks):
            for rank, model in self.grid.models(chunk, None):
                for name, local in model.items():
                    if (chunk, name) not in self.used:
                        piece = self._piece(f"{self.grid.sizes.key(chunk)}.{name}", rank, local)
                        found[piece.name] = piece
        return found

    def _disagree(self, binding: Binding, where: str, got: str, expected: str) -> None:
        self.disagreeing.append(Problem(binding.tensor, where, got, expected))

    def fail(self) -> None:
        """Raise what was found, if anything."""
        if self.disagreeing:
            raise ConvertError("MTP016", self.disagreeing)
        if self.misshapen:
            raise ConvertError("MTP024", self.misshapen, hint="config.json describes another model than the one stored")
