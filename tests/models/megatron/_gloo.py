"""Four gloo processes that run everything which needs communication; the tests compare what they bring back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mtp_convert.models.megatron.groups import Group
from mtp_convert.models.megatron.loss import mtp_depth_targets, predict_tokens
from mtp_convert.models.megatron.loss_logging import MTPLossLoggingHelper
from mtp_convert.models.megatron.packed import PackedSeqParams
from mtp_convert.models.megatron.roll import roll_tensor

DATA = Path(__file__).parent / "data"
WORLD = 4
Results = list[dict[str, Any]]  # one per rank


@dataclass(frozen=True)
class Roll:
    """One sequence to roll: `shape` is the whole tensor's, `cu` the packed boundaries, `cp` the number of ranks."""

    shape: tuple[int, ...]
    cp: int
    dim: int = -1
    cu: tuple[int, ...] | None = None
    shifts: int = -1
    dtype: torch.dtype = torch.int64

    @property
    def whole(self) -> Tensor:
        return torch.arange(1, 1 + math.prod(self.shape)).view(*self.shape).to(self.dtype)

    @property
    def packed(self) -> PackedSeqParams | None:
        return None if self.cu is None else PackedSeqParams(cu_seqlens_q=torch.tensor(self.cu, dtype=torch.int32))

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """What a rank holds of a tensor that is laid out like `whole`."""
        length = self.shape[self.dim]
        return whole.index_select(self.dim, torch.tensor(owned(length, self.cp, rank, self.cu)))


def owned(length: int, cp: int, rank: int, cu: tuple[int, ...] | None = None) -> list[int]:
    """Positions of a row on a rank: of each sequence chunks `rank` and `2 cp - 1 - rank`, of the rest an equal part."""
    ends = cu or (0, length)
    places: list[int] = []
    for start, end in pairwise(ends):
        chunk = (end - start) // (2 * cp)
        for number in (rank, 2 * cp - 1 - rank):
            places += range(start + number * chunk, start + (number + 1) * chunk)
    rest = (length - ends[-1]) // cp
    return places + list(range(ends[-1] + rank * rest, ends[-1] + (rank + 1) * rest))


def reference_rolls() -> list[tuple[Roll, list[dict[str, Any]]]]:
    """What megatron-core 0.19.2 made of int64 tensors 1, 2, 3, ... on every rank."""
    cases = json.loads((DATA / "rolls.json").read_text())["cases"]
    return [
        (Roll(tuple(c["shape"]), c["cp"], c["dim"], None if c["cu"] is None else tuple(c["cu"])), c["ranks"])
        for c in cases
    ]


ROLLS = (
    *(roll for roll, _ in reference_rolls() if roll.cp > 1),
    Roll((2, 8, 3), 2, dim=1, dtype=torch.float32),
    Roll((8, 2), 4, dim=0, dtype=torch.bfloat16),
    Roll((2, 16), 4, dtype=torch.bool),
    Roll((1, 24), 2, shifts=-2, dtype=torch.float64),
    Roll((2, 24), 4, shifts=-3),
    Roll((3, 40), 2, shifts=-2, cu=(0, 8, 8, 32, 40)),
    Roll((48, 2), 4, dim=0, cu=(0, 16, 40, 48)),
    Roll((1, 32), 4, cu=(0, 8)),
)
DEPTHS = Roll((2, 16), 2, cu=(0, 4, 16))
LOGITS = torch.tensor([[[1.0, 3, 3, 0, -1, 2, 3, 0]], [[0, 0, 0, 0, 0, 0, 0, 0]], [[-5, -4, -3, -2, -9, -8, -7, -1]]])


def _rolls(groups: dict[int, Group], rank: int) -> list[tuple[Tensor, Tensor] | None]:
    return [
        roll_tensor(roll.cut(roll.whole, rank), roll.shifts, roll.dim, groups[roll.cp], roll.packed)
        if rank < roll.cp
        else None
        for roll in ROLLS
    ]


def _targets(group: Group, rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    labels = DEPTHS.cut(DEPTHS.whole, rank)
    mask = DEPTHS.cut((DEPTHS.whole % 3 > 0).float(), rank)
    depths = mtp_depth_targets(labels, mask, 2, cp_group=group, packed_seq_params=DEPTHS.packed)
    return [(d.labels, d.loss_mask, d.num_tokens) for d in depths]


def _reduced(groups: dict[int, Group], rank: int) -> dict[str, Tensor]:
    """Rank r logs loss r + 1 at depth 0 and 10 (r + 1) at depth 1, summed over its pair and averaged over all."""
    for depth, factor in enumerate((1.0, 10.0)):
        loss, right, total = torch.tensor([factor * (rank + 1), rank, rank + 2.0])
        MTPLossLoggingHelper.save_metrics_to_tracker(loss, right, total, depth, 2, groups[2], groups[4])
    MTPLossLoggingHelper.reduce_loss_in_tracker()
    return {name: value for name, value in MTPLossLoggingHelper.tracker.items() if isinstance(value, Tensor)}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: dict[int, Group] = {2: pairs[rank // 2], 4: dist.group.WORLD}
    result: dict[str, Any] = {"rolls": _rolls(groups, rank), "reduced": _reduced(groups, rank)}
    if rank < DEPTHS.cp:
        result["targets"] = _targets(groups[DEPTHS.cp], rank)
    columns = LOGITS.chunk(WORLD, -1)[rank]
    result["predicted"] = predict_tokens(columns, groups[4])
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path) -> Results:
    """The results of every rank."""
    mp.spawn(_work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
