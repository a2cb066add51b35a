"""Where the places of a model are in its modules, and a forward pass that stops at each of them.

Nothing of a model is written anew here: its own forward runs, with functions of its modules replaced while it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from mtp_convert.verify.side import Tap


class Call(NamedTuple):
    """One call of a point: the place that it belongs to, and whether the place is entered and left with it."""

    place: str
    enters: bool = True
    leaves: bool = True


@dataclass(frozen=True)
class Point:
    """A function of a module that is a place, or a part of one.

    calls: what its first, second, ... call is. group: the weights that it needs. hidden: the argument that is the
    hidden input, by number or name; always that of the name `hidden_states`, if it is given. skipped: what stands for
    the output, from this argument alone, where the place is not to run; the argument itself by default.
    """

    owner: nn.Module
    calls: tuple[Call, ...]
    group: str
    method: str = "forward"
    hidden: int | str = 0
    skipped: Callable[[Tensor], Any] = lambda hidden: hidden


class Form(Protocol):
    """How a model's hidden states relate to batch-first ones [B, S, H]."""

    def batch_first(self, value: Tensor) -> Tensor:
        """Of the model's own form."""

    def own(self, value: Tensor, like: Tensor) -> Tensor:
        """Back to the model's own form, that of `like`."""


class Streams:
    """Batch first already; streams [B, S, X, H] are laid side by side."""

    def batch_first(self, value: Tensor) -> Tensor:
        """[B, S, H] or [B, S, X, H] -> [B, S, H] or [B, S, X * H]."""
        return value.flatten(2)

    def own(self, value: Tensor, like: Tensor) -> Tensor:
        """The shape of `like`."""
        return value.reshape(like.shape)


class SequenceFirst:
    """Hidden states [S, B, H]; token ids and logits are batch first."""

    def batch_first(self, value: Tensor) -> Tensor:
        """[S, B, H] -> [B, S, H]."""
        return value.transpose(0, 1)

    def own(self, value: Tensor, like: Tensor) -> Tensor:
        """[B, S, H] -> [S, B, H]; `like` does not matter."""
        return value.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Watch:
    """What happens at the points: weights are brought (`need`), then the tap sees what goes in and what comes out."""

    tap: Tap
    form: Form
    need: Callable[[str], None]
    only: Collection[str] | None = None

    @contextmanager
    def over(self, points: Sequence[Point]) -> Iterator[None]:
        """Watch these points of a model while it runs."""
        with ExitStack() as stack:
            for point in points:
                setattr(point.owner, point.method, self._watched(point))
                stack.callback(delattr, point.owner, point.method)
            yield

    def _watched(self, point: Point) -> Callable[..., Any]:
        original, calls = getattr(point.owner, point.method), iter(point.calls)

        def run(*positional: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any module's function
            call, args = next(calls), list(positional)
            at = "hidden_states" if "hidden_states" in kwargs else point.hidden
            given: Any = kwargs if isinstance(at, str) else args
            if self.only is not None and call.place not in self.only:
                return point.skipped(given[at])
            self.need(point.group)
            if call.enters:
                given[at] = self._entered(call.place, given[at])
            out = original(*args, **kwargs)
            if call.leaves:
                self.tap.leave(call.place, self.form.batch_first(out[0] if isinstance(out, tuple) else out))
            return out

        return run

    def _entered(self, place: str, hidden: Tensor) -> Tensor:
        return self.form.own(self.tap.enter(place, self.form.batch_first(hidden)), hidden)
