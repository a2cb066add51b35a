"""Reads legacy Megatron checkpoints: one `torch.save` file per rank, `mp_rank_XX[_YYY[_ZZZ]]/model_optim_rng.pt`.

Only the zip directories and the pickles are read, the latter with stand-ins; every tensor becomes a byte range. What a
rank's tensors are parts of is not known here (`mtp_convert.sharding`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_convert.containers import torch_zip
from mtp_convert.containers.base import usable_name
from mtp_convert.containers.paths import open_regular
from mtp_convert.containers.safe_pickle import read_pickle
from mtp_convert.containers.torch_zip import TensorBytes
from mtp_convert.errors import ConvertError, Problem

FOLDERS = "mp_rank_"
FILE = "model_optim_rng.pt"
COMMON = ("args", "checkpoint_version", "iteration")
STATE = "._extra_state"  # in the names of what is no weight


@dataclass(frozen=True)
class RankFile:
    """What one rank stored.

    models: by key (`model`, or `model0`, `model1`, .. with virtual pipeline stages) the tensors by local name. states:
    names of `_extra_state` entries. training: names of optimizer and random states. arguments: `args` and its kin.
    """

    folder: str
    path: Path
    models: Mapping[str, Mapping[str, TensorBytes]]
    states: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    arguments: Mapping[str, object] = field(default_factory=dict)


def is_legacy(folder: Path) -> bool:
    """Whether a folder holds ranks."""
    return any(folder.glob(f"{FOLDERS}*"))


def read(folder: Path) -> dict[str, RankFile]:
    """Every rank of the checkpoint in `folder` by its folder's name, from headers alone.

    Raises:
        ConvertError: MTP013 damaged, MTP014 a pickle that asks for code.
    """
    found: dict[str, RankFile] = {}
    problems: list[Problem] = []
    for place in sorted(folder.glob(f"{FOLDERS}*")):
        if not (place / FILE).is_file():
            problems.append(Problem("file is missing", f"{place.name}/{FILE}"))
            continue
        try:
            found[place.name] = _read_rank(place)
        except ConvertError as error:
            if error.code != "MTP013":
                raise
            problems += error.problems
    if problems:
        raise ConvertError("MTP013", problems)
    return found


def _read_rank(place: Path) -> RankFile:
    path, where = place / FILE, f"{place.name}/{FILE}"
    fd = open_regular(path)
    try:
        members = torch_zip.members(fd, 0, os.fstat(fd).st_size)
        state = read_pickle(torch_zip.structure_bytes(fd, members), where)
    except torch_zip.Damaged as error:
        raise torch_zip.damaged(error, "not a file of torch.save", where) from error
    finally:
        os.close(fd)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ConvertError("MTP013", Problem(f"holds a {type(state).__name__}, not the state of a rank", where))
    problems: list[Problem] = []
    models = {key: _model(state[key], members, where, problems) for key in state if is_model(key)}
    if not models:
        problems.append(Problem("holds no model", where, ", ".join(sorted(state)[:5]), "`model` or `model0`"))
    if problems:
        raise ConvertError("MTP013", problems)
    beside = (p.name for p in place.glob("*.pt") if p.name != FILE)
    return RankFile(
        place.name,
        path,
        {key: {n: t for n, t in tensors.items() if t is not None} for key, tensors in models.items()},
        frozenset(n for tensors in models.values() for n, t in tensors.items() if t is None),
        frozenset([*(key for key in state if key not in COMMON and not is_model(key)), *beside]),
        _arguments(state),
    )


def is_model(key: str) -> bool:
    """Whether an entry of a rank's state holds a model, or the part of one virtual pipeline stage."""
    number = key.removeprefix("model")
    return key.startswith("model") and (not number or number.isdecimal())


def _model(
    state: object, members: dict[str, torch_zip.Member], where: str, problems: list[Problem]
) -> dict[str, TensorBytes | None]:
    """Byte ranges by name; None for a module's `_extra_state`."""
    if not isinstance(state, dict):
        problems.append(Problem(f"the model is a {type(state).__name__}, not a dict", where))
        return {}
    found: dict[str, TensorBytes | None] = {}
    for name, value in state.items():
        if not usable_name(name):
            problems.append(Problem("a tensor without a usable name", where))
        elif STATE in name:
            found[name] = None
        else:
            try:
                found[name] = torch_zip.locate(value, members)
            except torch_zip.Damaged as error:
                problems.append(Problem(f"{name}: {error}", where))
    return found


def _arguments(state: Mapping[str, Any]) -> dict[str, object]:
    args = state.get("args")
    return {
        **{k: state[k] for k in COMMON if k in state},
        "args": dict(vars(args)) if hasattr(args, "__dict__") else {},
    }
