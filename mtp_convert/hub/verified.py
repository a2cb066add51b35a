"""The result of the last `verify`, read back from beside the weights, for the model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.verify.result import (
    Culprit,
    LogitScores,
    PlaceError,
    Section,
    SideFacts,
    Verification,
)


@dataclass(frozen=True)
class Verified:
    """result: None where there is none, or none about this folder (`notes` say so). Its paths are folder names."""

    result: Verification | None = None
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """The sides differ."""
        return self.result is not None and not self.result.ok

    def public(self) -> bytes:
        """The result as a file to publish."""
        assert self.result is not None
        return (json.dumps(self.result.to_json(), indent=1) + "\n").encode()


def read_verified(path: Path, folder: Path) -> Verified:
    """The result at `path`, if there is one and `folder` is a side of it.

    Raises:
        ConvertError: MTP061 for a file that holds no such result.
    """
    if not path.is_file():
        return Verified(notes=(f"no {path.name}: the card has no parity figures; `mtp-convert verify` writes it",))
    try:
        found = from_json(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConvertError("MTP061", Problem(f"no result of a verification: {error}", path.name)) from error
    name = folder.resolve().name
    if name not in (Path(found.a.path).resolve().name, Path(found.b.path).resolve().name):
        note = f"{path.name} is about {_shown(found.a.path)} and {_shown(found.b.path)}, not about {name}: left out"
        return Verified(notes=(note,))
    command = " ".join(_shown_word(w) for w in shlex.split(found.environment.get("command", "")))
    environment = {**found.environment, **({"command": command} if command else {})}
    a, b = (replace(side, path=_shown(side.path)) for side in (found.a, found.b))
    return Verified(replace(found, a=a, b=b, environment=environment))


def from_json(data: Mapping[str, Any]) -> Verification:
    """The inverse of `Verification.to_json`, as far as a card shows it: the mapping table stays out.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: for data of another form.
    """
    culprit = data["culprit"]
    return Verification(
        a=SideFacts(**data["a"]),
        b=SideFacts(**data["b"]),
        sections=tuple(_section(s) for s in data["sections"]),
        places=tuple(_numbers(PlaceError(**p)) for p in data["places"]),
        scores=tuple(_scores(s) for s in data["scores"]),
        culprit=None if culprit is None else _culprit(culprit),
        mode=data["mode"],
        quick=bool(data["quick"]),
        dtype=str(data["dtype"]),
        device=str(data["device"]),
        tokens=(int(data["tokens"][0]), int(data["tokens"][1])),
        seconds=float(data["seconds"]),
        environment={str(k): str(v) for k, v in data["environment"].items()},
    )


def _section(row: Mapping[str, Any]) -> Section:
    problems = tuple(Problem(**p) for p in row["problems"])
    return Section(row["level"], int(row["compared"]), problems, str(row["skipped"]), tuple(map(str, row["notes"])))


def _culprit(row: Mapping[str, Any]) -> Culprit:
    tensors = {side: tuple(map(str, row[side])) for side in ("a", "b", "suspects")}
    return Culprit(str(row["place"]), **tensors, guess=str(row["guess"]))


def _scores(row: Mapping[str, Any]) -> LogitScores:
    accepted = row["acceptance"]
    return LogitScores(
        str(row["place"]),
        _number(row["kl"]),
        _number(row["top1"]),
        _number(row["top5"]),
        (_number(row["loss"][0]), _number(row["loss"][1])),
        (_number(accepted[0]), _number(accepted[1])) if accepted else None,
    )


def _number(value: Any) -> float:  # noqa: ANN401 - checked by doing it
    """A figure; null stands for what is no number."""
    return float("nan") if value is None else float(value)


def _numbers(place: PlaceError) -> PlaceError:
    figures = {k: _number(v) for k, v in vars(place).items() if k != "place"}
    return replace(place, **figures)  # type: ignore[arg-type]


def _shown(path: str) -> str:
    """A path as strangers may read it: where a folder lies on somebody's disk is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else path


def _shown_word(word: str) -> str:
    name, equals, value = word.partition("=")
    return shlex.quote(f"{name}={_shown(value)}" if equals and name.startswith("--") else _shown(word))
