"""Tensors on disk for engine tests: random chunkings, params in several layouts, and their numpy twins."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_convert.containers.base import StoredChunk, StoredTensor
from mtp_convert.encodings.dtype import DType
from mtp_convert.engine.files import TensorExtent
from mtp_convert.engine.gather import Reader
from mtp_convert.mapping.layout import Layout, build
from mtp_convert.mapping.ops import Concat, Grouped, Permute
from mtp_convert.mapping.plan import Step, make_plan
from mtp_convert.mapping.rules import Block, Param, Placed, Row, rule
from mtp_convert.mapping.views import Shape

Array = NDArray[np.generic]
Box = tuple[Shape, Shape]
PARAMS = 3
KINDS = ("separate", "transposed", "rows", "columns", "grouped", "stack")


def boxes(shape: Shape, rng: random.Random, pieces: int) -> list[Box]:
    """Cut a shape into boxes by random straight cuts, so that rows, columns, grids and mixtures of them occur."""
    found: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(pieces - 1):
        at = rng.randrange(len(found))
        offset, sizes = found[at]
        wide = [d for d, n in enumerate(sizes) if n > 1]
        if wide:
            dim = rng.choice(wide)
            cut = rng.randrange(1, sizes[dim])
            found[at] = offset, (*sizes[:dim], cut, *sizes[dim + 1 :])
            moved = (*offset[:dim], offset[dim] + cut, *offset[dim + 1 :])
            found.append((moved, (*sizes[:dim], sizes[dim] - cut, *sizes[dim + 1 :])))
    rng.shuffle(found)
    return found


def store(folder: Path, name: str, array: Array, dtype: DType, cuts: Sequence[Box], rng: random.Random) -> StoredTensor:
    """Write an array chunk by chunk at odd positions of two files."""
    chunks = []
    for offset, sizes in cuts:
        path = folder / f"{name}.{rng.randrange(2)}.bin"
        with path.open("ab") as file:
            file.write(rng.randbytes(rng.randrange(9)))
            chunks.append(StoredChunk(offset, sizes, path, file.tell()))
            window = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
            file.write(np.ascontiguousarray(array[window]).tobytes())
    return StoredTensor(name, dtype, array.shape, tuple(chunks))


def layout(kind: str, shape: Shape) -> Layout:
    """Three equal params, told apart or held together in one of the ways of `KINDS`."""
    names = [f"p.{e}" for e in range(PARAMS)]
    rows: dict[str, tuple[Row, ...]] = {
        "separate": (rule("t.{e}", "p.{e}"),),
        "transposed": (rule("t.{e}", "p.{e}", op=Permute((1, 0))),),
        "rows": (rule("t", *names, op=Concat(0)),),
        "columns": (rule("t", *names, op=Concat(1)),),
        "grouped": (rule("t", *names, op=Grouped(2)),),
        "stack": (rule("t", "p.{e}", over=("e",)),),
    }
    block = Block((Param("p.{e}", shape),), {kind: rows[kind]}, {"e": range(PARAMS)})
    return build(kind, [Placed(block, "", {kind: ""})], {})


def tensors(kind: str, params: Sequence[Array]) -> dict[str, Array]:
    """What `layout(kind)` holds for these params, by numpy alone."""
    made: dict[str, Callable[[], Array]] = {
        "rows": lambda: np.concatenate(params, axis=0),
        "columns": lambda: np.concatenate(params, axis=1),
        "grouped": lambda: np.concatenate([np.split(p, 2)[g] for g in range(2) for p in params]),
        "stack": lambda: np.stack(params),
    }
    if kind in made:
        return {"t": made[kind]()}
    return {f"t.{e}": p.T if kind == "transposed" else p for e, p in enumerate(params)}


@dataclass(frozen=True)
class Case:
    """A target tensor to fill, and what numpy says it holds."""

    step: Step
    stored: Mapping[str, StoredTensor]
    wanted: Array
    dtype: DType

    def fill(self, offset: Shape, sizes: Shape, lo: int, hi: int, dtype: DType | None = None) -> bytes:
        """Bytes [lo, hi) of the chunk at `offset` of `sizes`; the buffer is dirty before."""
        reader = Reader()
        out = np.full(hi - lo, 0xA5, dtype=np.uint8)
        try:
            TensorExtent(self.step, self.stored, dtype or self.dtype, offset, sizes).fill(reader, out, lo, hi)
        finally:
            reader.close()
        return out.tobytes()

    def chunk(self, offset: Shape, sizes: Shape) -> Array:
        """The same chunk of the numpy twin."""
        return np.ascontiguousarray(self.wanted[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))])

    def padded(self, rows: int) -> "Case":
        """The same tensor with zero rows below."""
        more = np.zeros((rows, *self.wanted.shape[1:]), dtype=self.wanted.dtype)
        return replace(
            self,
            step=replace(self.step, shape=(self.step.shape[0] + rows, *self.step.shape[1:])),
            wanted=np.concatenate([self.wanted, more]),
        )


def cases(
    folder: Path, kinds: tuple[str, str], params: Sequence[Array], dtype: DType, rng: random.Random, most: int = 6
) -> Iterator[Case]:
    """One case per target tensor, with the source stored in chunks."""
    source, target = layout(kinds[0], params[0].shape), layout(kinds[1], params[0].shape)
    stored, number = {}, count()
    for name, array in tensors(kinds[0], params).items():
        cuts = boxes(array.shape, rng, rng.randint(1, most))
        stored[name] = store(folder, f"{name}-{next(number)}", array, dtype, cuts, rng)
    wanted = tensors(kinds[1], params)
    for step in make_plan(source, target).steps:
        yield Case(step, stored, wanted[step.tensor], dtype)
