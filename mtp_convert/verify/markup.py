"""HTML and SVG as nested calls. Text is escaped by construction: only what `tag` and `raw` return is markup.

    tag("td", place, class_="name")    ->    <td class="name">layers.3</td>

Output is well-formed XML as well as HTML, so that a strict parser can check it.
"""

from __future__ import annotations

from html import escape

from mtp_convert.summary import printable

_VOID = frozenset({"meta", "link", "br"})
Attribute = str | float | bool | None


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """Our own style sheets and scripts; never text of a checkpoint."""
    return Markup(text)


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """One element. `class_` is `class`, other underscores are hyphens; None and False leave an attribute out."""
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{head}/>")
    return Markup(f"<{name}{head}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children in a row; plain text is escaped, with control characters made visible."""
    return Markup("".join(c if isinstance(c, Markup) else escape(printable(c), quote=False) for c in children))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f' {name}="{escape(_text(value))}"'


def _text(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return ""
    if isinstance(value, float):  # a hundredth of a pixel is enough
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return printable(str(value))
