"""How tensor parallelism cuts a tensor: which boxes of it a rank holds, one behind the other.

A fused tensor of a column-parallel layer is cut part by part, [gate_r; up_r] on rank r, unless its parts are
interleaved by groups (q, k, v), where the ranks' shares are whole groups and so one run of rows; rows appended to them
are a run of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtp_convert.mapping.layout import Binding, LayoutError
from mtp_convert.mapping.ops import Appended, Concat, Permute
from mtp_convert.mapping.rules import Param
from mtp_convert.mapping.views import Box, Shape


@dataclass(frozen=True, slots=True)
class Cut:
    """The dimension that is split over ranks (None: every rank holds all of it), and the runs along it that are split
    one by one."""

    dim: int | None
    runs: tuple[int, ...] = ()

    def divides(self, n: int) -> bool:
        """Whether `n` ranks get equal shares, each of them runs of bytes."""
        return all(run % n == 0 for run in self.runs) and not self.scattered(n)

    def scattered(self, n: int) -> bool:
        """Whether a rank's shares of several runs lie side by side in its rows."""
        return n > 1 and bool(self.dim) and len(self.runs) > 1

    def local(self, shape: Shape, n: int) -> Shape:
        """The shape that each of `n` ranks holds."""
        if self.dim is None:
            return shape
        return (*shape[: self.dim], shape[self.dim] // n, *shape[self.dim + 1 :])

    def boxes(self, shape: Shape, rank: int, n: int) -> tuple[Box, ...]:
        """What rank `rank` of `n` holds of a tensor of `shape`: offset and sizes of every box, in stored order."""
        if self.dim is None or n == 1:
            return (((0,) * len(shape), shape),)
        found: list[Box] = []
        start = 0
        for run in self.runs:
            share = run // n
            offset = tuple(start + rank * share if d == self.dim else 0 for d in range(len(shape)))
            found.append((offset, (*shape[: self.dim], share, *shape[self.dim + 1 :])))
            start += run
        return tuple(found)


def cut_of(binding: Binding, params: Mapping[str, Param], rows: int | None = None) -> Cut:
    """The cut of a tensor; `rows` are those of a padded vocabulary tensor.

    Raises:
        LayoutError: the shares of a rank are not one behind the other: params cut differently, a stack, fused columns.
    """
    parts = [params[p.param] for p in binding.parts]
    dim = parts[0].cut
    op = binding.op.of if isinstance(binding.op, Permute) else binding.op
    fused = isinstance(op, Concat) and op.dim == dim and len(parts) > 1
    if any(p.cut != dim for p in parts) or binding.stacked or (fused and dim):
        raise LayoutError(f"{binding.tensor!r}: no rule says how its params {[p.name for p in parts]} are cut together")
    if dim is None:
        return Cut(None)
    if isinstance(binding.op, Permute):
        at = binding.op.order.index(dim)
        return Cut(at, tuple(p.shape[dim] for p in parts) if fused else (binding.shape[at],))
    if rows is not None:
        return Cut(dim, (rows,))
    if isinstance(binding.op, Appended):
        last = parts[-1].shape[dim]
        return Cut(dim, (binding.shape[dim] - last, last))
    return Cut(dim, tuple(p.shape[dim] for p in parts) if fused else (binding.shape[dim],))
