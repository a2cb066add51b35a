"""A side whose runs are phases with progress."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_convert.progress import Phases
from mtp_convert.verify.side import Side, Tap
from mtp_convert.verify.taps import Ticking


@dataclass
class Announced:
    """A side that says what it runs, and place by place how far it is."""

    side: Side
    name: str
    phases: Phases

    def __post_init__(self) -> None:
        self.facts = self.side.facts

    def places(self) -> tuple[str, ...]:
        """See Side."""
        return self.side.places()

    def tensors(self, place: str) -> tuple[str, ...]:
        """See Side."""
        return self.side.tensors(place)

    def run(
        self,
        ids: Tensor,
        tap: Tap,
        *,
        dtype: torch.dtype,
        device: torch.device,
        streamed: bool,
        only: Collection[str] | None = None,
    ) -> None:
        """See Side."""
        phase = f"running {self.name} in {str(dtype).removeprefix('torch.')}"
        with self.phases(phase, len(self.places() if only is None else only), unit=" places") as tick:
            self.side.run(ids, Ticking(tap, tick), dtype=dtype, device=device, streamed=streamed, only=only)
