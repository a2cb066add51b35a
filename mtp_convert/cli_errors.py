"""From an exception to a sentence on stderr and an exit code, in one place."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from mtp_convert.errors import ConvertError

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


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def guarded(app: Callable[..., Any]) -> NoReturn:
    """Run the command line and leave with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except ConvertError as error:
        if debug:
            raise
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        code = 130
    except _Terminated:
        print("terminated: nothing was left behind", file=sys.stderr)
        code = 143
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _other(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception, debug: bool) -> int:
    """Usage errors of the parser, and our own mistakes."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        print("interrupted", file=sys.stderr)
        return 130
    if debug:
        raise error
    print(f"error[MTP090]: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    print("hint: please report it with the output of --debug", file=sys.stderr)
    return 1
