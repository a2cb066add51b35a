"""Who a process is in a parallel job: its rank in, and the size of, every process group.

Most of the code asks a group for `rank()` and `size()` only. A `torch.distributed.ProcessGroup` answers that, and so
does a `Member`, which has no other processes behind it: one process can play every rank of a job in turn, which is
how shardings and placements are computed.

    sizes = ParallelSizes(tp=2, pp=2)
    for rank in range(sizes.world):
        with use_groups(sizes.at(rank)):
            ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Protocol


class Group(Protocol):
    """A process group, as far as sharding and placement need it."""

    def rank(self) -> int:
        """Rank of this process inside the group."""

    def size(self) -> int:
        """Number of processes in the group."""


@dataclass(frozen=True, slots=True)
class Member:
    """One place in a group that cannot communicate; the default is a group of one."""

    index: int = 0
    members: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.members:
            raise ValueError(f"rank {self.index} is outside a group of {self.members}")

    def rank(self) -> int:
        """Rank inside the group."""
        return self.index

    def size(self) -> int:
        """Number of members."""
        return self.members


_ALONE = Member()


@dataclass(frozen=True)
class ProcessGroupCollection:
    """The groups of one process, under Megatron's names; everything left out is a group of one."""

    tp: Group = _ALONE  # tensor
    pp: Group = _ALONE  # pipeline
    cp: Group = _ALONE  # context
    dp: Group = _ALONE  # data
    dp_cp: Group = _ALONE  # data and context together: the copies of a dense weight
    ep: Group = _ALONE  # expert
    expt_tp: Group = _ALONE  # tensor, inside experts
    expt_dp: Group = _ALONE  # data, inside experts: the copies of an expert's weight
    vp_size: int | None = None  # virtual pipeline stages per rank; None when there is one


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How a job is cut. `etp` (tensor size inside experts) is `tp` when not given, as in Megatron.

    Raises ValueError for sizes below 1 and when `etp * ep` does not divide `tp * cp * dp`.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vp: int | None = None

    def __post_init__(self) -> None:
        small = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) is not None and v < 1]
        if small:
            raise ValueError(f"parallel sizes start at 1, got {', '.join(small)}")
        if self._stage % (self._etp * self.ep):
            experts = f"etp * ep = {self._etp * self.ep}"
            raise ValueError(f"{experts} does not divide the {self._stage} processes of a stage, tp * cp * dp")

    @property
    def _etp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def _stage(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def world(self) -> int:
        """Number of processes."""
        return self._stage * self.pp

    def at(self, rank: int) -> ProcessGroupCollection:
        """The groups of global `rank`, in Megatron's default order: tp varies fastest, then cp, (ep,) dp, pp."""
        stage, inside = divmod(Member(rank, self.world).index, self._stage)
        data, tp = divmod(inside, self.tp)
        experts, etp = divmod(inside, self._etp)
        return ProcessGroupCollection(
            tp=Member(tp, self.tp),
            pp=Member(stage, self.pp),
            cp=Member(data % self.cp, self.cp),
            dp=Member(data // self.cp, self.dp),
            dp_cp=Member(data, self.dp * self.cp),
            ep=Member(experts % self.ep, self.ep),
            expt_tp=Member(etp, self._etp),
            expt_dp=Member(experts // self.ep, self._stage // (self._etp * self.ep)),
            vp_size=self.vp,
        )


_SINGLE_PROCESS = ProcessGroupCollection()
_current: ContextVar[ProcessGroupCollection] = ContextVar("process groups", default=_SINGLE_PROCESS)


def current_groups() -> ProcessGroupCollection:
    """The groups that hold where none are passed: a single process unless `use_groups` says otherwise."""
    return _current.get()


@contextmanager
def use_groups(groups: ProcessGroupCollection) -> Iterator[ProcessGroupCollection]:
    """Make `groups` the current ones inside the block."""
    token = _current.set(groups)
    try:
        yield groups
    finally:
        _current.reset(token)
