"""Files of tolerances that are checked in: the largest relative error that a place may have, by the place's name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.verify.result import PlaceError, Verification

ROOM = 4.0  # what another machine's rounding may make of a written error


def read(path: Path) -> dict[str, float]:
    """Tolerances by place, from `{"schema_version": 1, "places": {"logits": 1e-5}}`.

    Raises:
        ConvertError: MTP002 no such file, MTP001 not such an object; every bad entry is named.
    """
    if not path.is_file():
        raise ConvertError("MTP002", Problem("no such file", str(path)), hint="--write-baseline makes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        places = data["places"]
        bad = [name for name, value in places.items() if isinstance(value, bool) or not 0 <= value < float("inf")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConvertError("MTP001", Problem("not a baseline", str(path), str(error))) from error
    if bad:
        raise ConvertError("MTP001", [Problem("no tolerance", str(path), repr(places[n]), n) for n in bad])
    return {name: float(value) for name, value in places.items()}


def write(path: Path, found: Verification) -> None:
    """Write the errors of a run as tolerances, with room for another machine."""
    places = {p.place: float(f"{max(p.relative * ROOM, p.threshold):.2g}") for p in found.places}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema_version": 1, "places": places}, indent=1) + "\n", encoding="utf-8")


def apply(
    places: tuple[PlaceError, ...], tolerances: Mapping[str, float], known: Collection[str]
) -> tuple[PlaceError, ...]:
    """Places with the thresholds of a baseline where it has one.

    Raises:
        ConvertError: MTP001 when the baseline names places that are not `known`, so that a wrong file is noticed.
    """
    if unknown := sorted(tolerances.keys() - set(known)):
        raise ConvertError(
            "MTP001", [Problem("the model has no such place as the baseline names", got=n) for n in unknown]
        )
    return tuple(replace(p, threshold=tolerances.get(p.place, p.threshold)) for p in places)
