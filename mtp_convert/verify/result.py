"""What a verification finds, as data. Rendered by `render`, `report`, `junit` and `github`; computed by `judge`.

A place is a point of the computation that every model of a kind has, whatever its modules are called:

    embedding, layers.0, layers.1, ..., final_norm, logits, and for every MTP step k
    mtp.k.fused (embedding and hidden state, normalised and projected), mtp.k.block (after the depth's final norm),
    mtp.k.logits
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from mtp_convert.errors import Problem
from mtp_convert.readable import Readable, strict

Level = Literal["names", "shapes", "bits", "forward"]
LEVELS: tuple[Level, ...] = ("names", "shapes", "bits", "forward")


@dataclass(frozen=True)
class Section:
    """One level: how many things were compared and what was found. `skipped` says why nothing was compared."""

    level: Level
    compared: int
    problems: tuple[Problem, ...] = ()
    skipped: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing found; a skipped level finds nothing."""
        return not self.problems


@dataclass(frozen=True)
class PlaceError:
    """How far side B is from side A at one place, given the same input [B, S, H] as A had there.

    `relative` is the largest absolute difference over the largest absolute value of A (in 16 bits of the best nine
    tokens in ten where experts or keys are chosen, since near ties break either way); `floor` the same between A and A
    in another precision, so what rounding alone makes; above `threshold` the place is wrong. `chained` is the relative
    error when B runs on its own inputs from the token ids on: it accumulates, and is no verdict.
    """

    place: str
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    floor: float
    threshold: float
    chained: float

    @property
    def ok(self) -> bool:
        """Within what rounding explains; NaN is not."""
        return self.relative <= self.threshold


@dataclass(frozen=True)
class LogitScores:
    """Logits [B, S, V] of both sides, each from its own chain; pairs are (A, B).

    `kl` is the mean KL divergence of B from A in nats per token, `top1` and `top5` are shares of tokens on which both
    agree, `loss` the cross-entropy of the tokens that follow (nats), `acceptance` the share of drafts that the side's
    own main model would have chosen (None for the main logits).
    """

    place: str
    kl: float
    top1: float
    top5: float
    loss: tuple[float, float]
    acceptance: tuple[float, float] | None = None


@dataclass(frozen=True)
class Culprit:
    """The first place that leaves the floor, and the tensors of both sides that feed it.

    `suspects` are params that differ between the checkpoints, if any do; `guess` says what may have happened.
    """

    place: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    suspects: tuple[str, ...] = ()
    guess: str = ""


@dataclass(frozen=True)
class SideFacts:
    """One side: where it is, what it is, and whose code ran it."""

    path: str
    family: str
    layout: str
    container: str
    dtypes: dict[str, int]
    backend: str = ""


@dataclass(frozen=True)
class Mapped:
    """One row of the mapping table: a kind of tensor on both sides, indices collapsed, and how often it occurs."""

    a: str
    b: str
    op: str
    count: int


@dataclass(frozen=True)
class Verification(Readable):
    """Everything that one run found. `mode` is how weights travelled: whole or streamed."""

    shown_by: ClassVar[str] = "mtp_convert.render_verify.show_verification"

    a: SideFacts
    b: SideFacts
    sections: tuple[Section, ...]
    places: tuple[PlaceError, ...] = ()
    scores: tuple[LogitScores, ...] = ()
    culprit: Culprit | None = None
    mode: Literal["whole", "streamed"] = "whole"
    quick: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    tokens: tuple[int, int] = (0, 0)  # rows, positions
    seconds: float = 0.0
    mapping: tuple[Mapped, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every level that ran found nothing, and every place that ran is within what rounding explains."""
        return all(s.ok for s in self.sections) and all(p.ok for p in self.places)

    def section(self, level: Level) -> Section:
        """The section of a level."""
        return next(s for s in self.sections if s.level == level)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        found: dict[str, Any] = strict({"schema_version": 1, "ok": self.ok, **asdict(self)})
        return found
