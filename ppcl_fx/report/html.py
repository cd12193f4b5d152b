"""Markup that is safe by construction: plain strings are escaped, only :class:`Html` is taken as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is markup already. Only the functions of this module should make it."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def render(child: Child) -> str:
    """Return `child` as markup: strings escaped, None as nothing, iterables one after the other."""
    if child is None:
        return ""
    if isinstance(child, Html):
        return str.__str__(child)
    if isinstance(child, str):
        return html.escape(child, quote=True)
    if isinstance(child, int | float):
        return html.escape(number(child))
    return "".join(render(part) for part in child)


def number(value: float) -> str:
    """Return a number for an attribute or a text: integers as they are, floats with at most six digits."""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def tag(name: str, *children: Child, **attributes: Any) -> Html:
    """Return ``<name attributes>children</name>``.

    A trailing underscore of an attribute's name is dropped (``class_``), other underscores become hyphens;
    ``None`` and ``False`` leave an attribute out, ``True`` writes it without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(render(child) for child in children)}</{name}>")


def join(*children: Child) -> Html:
    """Return the children one after the other as one piece of markup."""
    return Html("".join(render(child) for child in children))


def section(anchor: str, title: str, lead: str, *children: Child) -> Html:
    """Return a section of the page: its heading, one paragraph if there is one, and the rest."""
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else None, *children, id=anchor)


def table(
    names: Sequence[str], rows: Iterable[Sequence[Child]], words: str, left: bool = True, class_: str | None = None
) -> Html:
    """Return a table in a frame that scrolls. The first cell of a row is its heading; a cell may be a ``<td>`` itself.

    Args:
        names: of the columns.
        rows: cells from left to right.
        words: the caption.
        left: whether the first column's name is on the left.
        class_: of the table.
    """
    head = [tag("th", name, class_="left" if left and i == 0 else None, scope="col") for i, name in enumerate(names)]
    body = [tag("tr", tag("th", first, scope="row"), [_td(cell) for cell in rest]) for first, *rest in rows]
    parts = tag("caption", words), tag("thead", tag("tr", head)), tag("tbody", body)
    return tag("div", tag("table", *parts, class_=class_), class_="scroll", tabindex=0)


def _td(cell: Child) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else tag("td", cell)


def quantity(value: int | None) -> str:
    """Return a number of parameters in words that fit a table: ``4.83 M``, ``20.43 B``, ``8 000``."""
    if value is None:
        return "–"
    for unit, name in ((10**9, " B"), (10**6, " M")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:,}".replace(",", " ")


def definitions(pairs: Mapping[str, object], class_: str = "facts") -> Html:
    """Return a definition list of the pairs; sequences are joined by commas."""
    words = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for key, v in pairs.items()}
    return tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in words.items()], class_=class_)


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = number(value) if isinstance(value, int | float) else html.escape(str(value), quote=True)
    return f' {name}="{text}"'


_VOID = frozenset({"meta", "img", "br", "hr", "link", "col"})
