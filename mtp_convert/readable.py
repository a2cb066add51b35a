"""Results that print as the command line shows them, in a Python session and in a notebook."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from math import isfinite
from typing import Any, ClassVar

_COLOURS = {"1": "font-weight:600", "2": "opacity:.6", "31": "color:#c5221f", "32": "color:#188038"}
_COLOURS |= {"33": "color:#b06000", "36": "color:#007b83"}
_ESCAPE = "\x1b["


class Readable:
    """Gives a result class the text of the command line as `str()`, and the same with its styles in a notebook.

    shown_by: the function that prints it.
    """

    shown_by: ClassVar[str] = "mtp_convert.render.show"

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return f'<pre style="line-height:1.35">{styled(text(self, colour=True))}</pre>'


def text(result: Readable, *, colour: bool = False) -> str:
    """What the command line prints for a result; with `colour`, ANSI styles in it."""
    module, _, function = result.shown_by.rpartition(".")
    show, out = getattr(import_module(module), function), io.StringIO()
    with redirect_stdout(out), _colours(colour):
        show(result)
    return out.getvalue().rstrip("\n")


def styled(ansi: str) -> str:
    """Text with ANSI styles as HTML; everything else in it is escaped."""
    first, *rest = ansi.split(_ESCAPE)
    parts = [html.escape(first)]
    for piece in rest:
        code, _, words = piece.partition("m")
        parts.append("</span>" if code == "0" else f'<span style="{_COLOURS.get(code, "")}">')
        parts.append(html.escape(words))
    return "".join(parts)


@contextmanager
def _colours(wanted: bool) -> Iterator[None]:
    """`render.paint` decides by the environment; this decides for it."""
    before = {name: os.environ.get(name) for name in ("FORCE_COLOR", "NO_COLOR")}
    os.environ.update(FORCE_COLOR="1" if wanted else "", NO_COLOR="" if wanted else "1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def strict(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A JSON value of a result: JSON has no NaN and no infinity, they become null."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
