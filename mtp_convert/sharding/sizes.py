"""Parallel sizes, and which ranks of a legacy checkpoint have a file of their own.

A pipeline stage runs on a multiple of both tensor and expert_tensor * expert processes. Process p has tensor rank
p % tensor, expert-tensor rank p % expert_tensor and expert rank p // expert_tensor % expert. A file is named by tensor,
pipeline and expert rank, so the expert-tensor rank has to follow from the tensor rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple

from mtp_convert.errors import ConvertError, Problem

LARGEST, MOST = 1 << 12, 1 << 16  # of one size; of all ranks
# field -> the training argument that says the same
ARGUMENTS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
}
# how many numbers a folder's name has -> what they may count
NUMBERED: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("tensor",),),
    2: (("tensor", "pipeline"), ("tensor", "expert")),
    3: (("tensor", "pipeline", "expert"),),
}


class Rank(NamedTuple):
    """The coordinates of a file."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many ranks a model is spread over; `virtual` is the number of model chunks per pipeline stage."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual: int = 1

    @property
    def chunks(self) -> int:
        """Pieces that the decoder is cut into. Chunk c lies on stage c % pipeline as its model c // pipeline."""
        return self.pipeline * self.virtual

    def problems(self) -> Iterator[Problem]:
        """Why no legacy checkpoint has these sizes."""
        if self.tensor % self.expert_tensor:
            yield Problem(
                "expert tensor parallel size",
                got=str(self.expert_tensor),
                expected=f"a divisor of the tensor parallel size {self.tensor}: file names have no expert-tensor rank",
            )
        if self.virtual > 1 and self.pipeline == 1:
            yield Problem("virtual pipeline stages", got=str(self.virtual), expected="more than one pipeline stage")

    def folder(self, rank: Rank) -> str:
        """The name that Megatron-LM gives the folder of a rank."""
        name = f"mp_rank_{rank.tensor:02d}"
        name += f"_{rank.pipeline:03d}" if self.pipeline > 1 else ""
        return name + (f"_{rank.expert:03d}" if self.expert > 1 else "")

    def key(self, chunk: int) -> str:
        """The entry of a rank's state that holds a chunk."""
        return f"model{chunk // self.pipeline}" if self.virtual > 1 else "model"

    def ranks(self) -> tuple[Rank, ...]:
        """Every rank that loads a file."""
        return self._ranks(lcm(self.tensor, self.expert_tensor * self.expert))

    def saved(self) -> tuple[Rank, ...]:
        """Every rank that Megatron-LM writes a file for: fewer where neither product divides the other."""
        return self._ranks(max(self.tensor, self.expert_tensor * self.expert))

    def _ranks(self, processes: int) -> tuple[Rank, ...]:
        pairs = {(p % self.tensor, p // self.expert_tensor % self.expert) for p in range(processes)}
        return tuple(sorted(Rank(t, p, e) for t, e in pairs for p in range(self.pipeline)))


def requested(parallel: Mapping[str, int]) -> Sizes:
    """The sizes that somebody asked for; experts are cut like everything else unless told otherwise, as in Megatron."""
    given = {name: parallel[name] for name in ARGUMENTS if parallel.get(name)}
    return Sizes(**{"expert_tensor": given.get("tensor", 1), **given})


def possible(folders: Iterable[str], arguments: Mapping[str, object]) -> list[Sizes]:
    """The sizes that the folders of a checkpoint can have, the likeliest first; `virtual` is left at 1.

    Two numbers in a name may be tensor and pipeline or tensor and expert rank, and the expert-tensor size has no number
    at all: where the training arguments do not say, several answers remain.

    Raises:
        ConvertError: MTP016 for names of different kinds, ranks that are missing or too many, or arguments that differ.
    """
    names = sorted(folders)
    numbers = [_numbers(name) for name in names]
    odd = [n for n, found in zip(names, numbers, strict=True) if found is None or len(found) != len(numbers[0] or ())]
    if odd:
        expected = "mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE, all alike"
        raise ConvertError("MTP016", [Problem("folder", got=n, expected=expected) for n in odd])
    counts = [max(column) + 1 for column in zip(*filter(None, numbers), strict=True)]
    candidates = [Sizes(**dict(zip(fields, counts, strict=True))) for fields in NUMBERED[len(counts)]]
    told = _told(arguments)
    agreeing = [c for c in candidates if not _differing(c, told)] or candidates[:1]
    if problems := _differing(agreeing[0], told):
        raise ConvertError("MTP016", problems)
    complete = [s for c in agreeing for s in _expert_tensor(c, told) if not _unequal(s, names)]
    if not complete:
        first = next(iter(_expert_tensor(agreeing[0], told)))
        raise ConvertError("MTP016", _unequal(first, names), hint="copy the folders of all ranks into one place")
    return complete


def _numbers(name: str) -> tuple[int, ...] | None:
    """The ranks in a folder's name, None when Megatron-LM would not write it so."""
    words = name.split("_")[2:]
    if not 1 <= len(words) <= 3 or not all(w.isascii() and w.isdecimal() for w in words):
        return None
    found = tuple(map(int, words))
    written = "_".join(f"{n:0{3 if i else 2}d}" for i, n in enumerate(found))
    return found if name == f"mp_rank_{written}" and max(found) < LARGEST else None


def _told(arguments: Mapping[str, object]) -> dict[str, int]:
    """The sizes that training arguments give."""
    given = {field: arguments.get(name) for field, name in ARGUMENTS.items()}
    return {f: n for f, n in given.items() if isinstance(n, int) and 0 < n < LARGEST}


def _differing(sizes: Sizes, told: Mapping[str, int]) -> list[Problem]:
    return [
        Problem(ARGUMENTS[f], "the names of the folders", str(getattr(sizes, f)), f"{told[f]}, as in `args`")
        for f in ("tensor", "pipeline", "expert")
        if f in told and told[f] != getattr(sizes, f)
    ]


def _expert_tensor(sizes: Sizes, told: Mapping[str, int]) -> Iterator[Sizes]:
    """With every expert-tensor size that is possible."""
    divisors = [n for n in range(sizes.tensor, 0, -1) if sizes.tensor % n == 0]
    for n in [told["expert_tensor"]] if told.get("expert_tensor") in divisors else divisors:
        yield replace(sizes, expert_tensor=n)


def _unequal(sizes: Sizes, names: list[str]) -> list[Problem]:
    """Folders that are missing or too many; both complete sets are fine."""
    if sizes.tensor * sizes.pipeline * sizes.expert > MOST:  # a name that nobody gave to a folder of a real run
        return [Problem("folders", got=f"{len(names)}, the last {names[-1]}", expected=f"at most {MOST} ranks")]
    every, saved = ({sizes.folder(r) for r in ranks} for ranks in (sizes.ranks(), sizes.saved()))
    have = set(names)
    if have in (every, saved):
        return []
    missing = [Problem("folder is missing", n) for n in sorted(every - have)]
    return missing + [Problem("folder belongs to no rank of these sizes", n) for n in sorted(have - every)]
