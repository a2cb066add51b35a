"""Folding, unfolding and leaving out MTP depths: which source params make a target param when their number changes.

fold: D equal depths become one. Equal means byte for byte, checked before anything is written; unequal depths are
refused unless the user says what the one depth should be. unfold: every target depth is the one stored depth. Without
depths nothing is related.
"""

from __future__ import annotations

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import StoredTensor
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.plan import Alias, same_param

FORCES = ("mean", "first")


def folding(source: Checkpoint, depths: int, force: str | None) -> tuple[Alias, tuple[str, ...]]:
    """The alias of a plan to a target with `depths` physical depths, and what to tell the user.

    Raises:
        ConvertError: MTP027 the depths differ, MTP028 the numbers of depths cannot be related.
    """
    stored = source.dims.depths
    if depths == stored:
        return same_param, ()
    if depths == 0:
        return same_param, (f"{stored} MTP depth{'s'[: stored != 1]} left out",)
    if depths == 1 and stored > 1:
        if force == "mean":
            return _all_depths(stored), (f"{stored} MTP depths averaged into one",)
        if force is None:
            _refuse_unequal(source)
        return _first_depth, (f"{stored} MTP depths folded into one",)
    if stored == 1 and depths > 1:
        return _first_depth, (f"one MTP depth unfolded into {depths} equal ones",)
    raise ConvertError(
        "MTP028",
        Problem(
            "MTP depths cannot be related",
            got=f"{stored} stored",
            expected="one, or as many as wanted",
        ),
        hint="fold makes one depth of equal ones, unfold makes several of one",
    )


def depth_of(param: str) -> int | None:
    """The MTP depth that a param belongs to: params of depth k are named `mtp.{k}.*`."""
    head, _, rest = param.partition(".")
    return int(rest.partition(".")[0]) if head == "mtp" else None


def at_depth(param: str, depth: int) -> str:
    """The param of the same role at another depth."""
    return f"mtp.{depth}.{param.split('.', 2)[2]}"


def _first_depth(param: str) -> tuple[str, ...]:
    return (param,) if depth_of(param) is None else (at_depth(param, 0),)


def _all_depths(count: int) -> Alias:
    def alias(param: str) -> tuple[str, ...]:
        if depth_of(param) is None:
            return (param,)
        return tuple(at_depth(param, k) for k in range(count))

    return alias


def _refuse_unequal(source: Checkpoint) -> None:
    """Compare every tensor of depth 1.. with its twin at depth 0; name the first that differs."""
    reader = Reader()
    try:
        for binding in source.layout.bindings.values():
            depth = depth_of(binding.parts[0].param)
            if not depth:
                continue
            tensor = source.tensor(binding.tensor)
            twin = _twin(source, binding.parts[0].param)
            difference = compare(StoredExtent(twin), StoredExtent(tensor), reader)
            if difference is not None:
                raise ConvertError(
                    "MTP027",
                    Problem(f"{tensor.name} is not {twin.name}: {difference.text()}"),
                    hint="--force-fold mean averages the depths, --force-fold first keeps the first",
                )
    finally:
        reader.close()


def _twin(source: Checkpoint, param: str) -> StoredTensor:
    return source.tensor(source.layout.home[at_depth(param, 0)][0].tensor)
