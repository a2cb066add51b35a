"""When two arrays hold the same values: to the last bit, or as far as the types that they are stored in can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]  # float32 or float64
Both = tuple[Values, Values]  # of A and of B, of one shape
Fit = Literal["exact", "rounding"]
Agrees = Callable[..., Fit | None]


class Rounding(NamedTuple):
    """How far a stored value may be from the true one: relative to it, and relative to the largest of the param."""

    relative: float
    to_largest: float = 0.0


EXACT = Rounding(0.0)


def agree(wanted: Values, found: Values, *, rounding: Rounding, scale: float = 0.0) -> Fit | None:
    """Whether two arrays hold the same values (NaN equals NaN), and how well.

    Args:
        scale: magnitude of what was added on the way, whose rounding stays in the sum.
    """
    differs = differing(wanted, found)
    if not differs.any():
        return "exact"
    if rounding == EXACT or beyond(wanted, found, rounding=rounding, scale=scale).any():
        return None
    return "rounding"


def beyond(wanted: Values, found: Values, *, rounding: Rounding, scale: float = 0.0) -> npt.NDArray[np.bool_]:
    """Where two arrays are further apart than rounding can make them."""
    size = np.maximum(np.abs(wanted), np.abs(found))
    finite = np.isfinite(size)
    largest = float(np.max(size, where=finite, initial=0.0))
    allowed = rounding.relative * np.maximum(size, scale) + rounding.to_largest * largest
    near = finite & (np.abs(wanted - found) <= allowed)
    return np.asarray(differing(wanted, found) & ~near)


def differing(a: Values, b: Values) -> npt.NDArray[np.bool_]:
    """Where two arrays hold different values."""
    return np.asarray((a != b) & ~(np.isnan(a) & np.isnan(b)))
