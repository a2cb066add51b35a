"""From an exception to a sentence on stderr and an exit code, in one place."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from mtp_convert.errors import ConvertError, Problem

MOST_PROBLEMS = 20


def report(error: ConvertError) -> None:
    """An error on stderr: code, every problem, hint."""
    from mtp_convert.summary import printable

    first, *more = [printable(p.line()) for p in error.problems]
    print(f"error[{error.code}]: {error.kind.title}: {first}", file=sys.stderr)
    for line in more[: MOST_PROBLEMS - 1]:
        print(f"  {line}", file=sys.stderr)
    if len(more) >= MOST_PROBLEMS:
        print(f"  ... and {len(more) - MOST_PROBLEMS + 1} more", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


class _Stopped(BaseException):
    """A signal arrived; a second one ends the process at once."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise _Stopped(number)


def guarded(app: Callable[..., Any]) -> NoReturn:
    """Run the command line and leave with its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except ConvertError as error:
        if debug:
            raise
        report(error)
        code = error.exit_code
    except _Stopped as stopped:
        word = "interrupted" if stopped.number == signal.SIGINT else "terminated"
        print(f"{word}: nothing unfinished can be seen; run the command again", file=sys.stderr)
        code = 128 + stopped.number
    except SystemExit:
        code = 0  # typer's answer to a reader of stdout that left early
    except Exception as error:
        code = _other(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception, debug: bool) -> int:
    """Usage errors of the parser, the operating system's refusals, and our own mistakes."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", 2))
    if debug:
        raise error
    if isinstance(error, OSError):
        problem = Problem(error.strerror or str(error), str(error.filename or ""))
        refused = ConvertError("MTP042", problem, hint="check the path and its permissions")
        report(refused)
        return refused.exit_code
    print(f"error[MTP090]: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    print("hint: please report it with the output of --debug", file=sys.stderr)
    return 1
