"""The page: what the templates are filled with, and the words that several of them need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ppcl_fx.report.svg import short, ticks
from ppcl_fx.schema.analysis import Redundancy


def quantity(value: int | None) -> str:
    """Return a number of parameters in words that fit a table: ``4.83 M``, ``20.43 B``, ``8 000``."""
    if value is None:
        return "–"
    for unit, name in ((10**9, " B"), (10**6, " M")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:,}".replace(",", " ")


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _plain(value: object) -> object:
    """Return what is shown of a value: nothing of None, and at most six digits of a number."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_plain,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"quantity": quantity, "listed": _listed, "short": short}
_ENVIRONMENT.globals |= {"ticks": ticks}


def page(**parts: Any) -> str:
    """Return the whole document: `title`, `lead`, `cards` as (value, words), and `sections` by their anchor.

    What a section holds is the `view` of the template of its anchor's name. All text is escaped.
    """
    return _ENVIRONMENT.get_template("page.html").render(parts) + "\n"


def drawn(macro: str, *values: object) -> str:
    """Return what a macro of ``macros.html`` makes of values."""
    return str(getattr(_ENVIRONMENT.get_template("macros.html").module, macro)(*values))


def provenance(facts: Mapping[str, object], redundancy: Redundancy | None) -> dict[str, object]:
    """Return where the numbers come from: what the caller says, and the fingerprints of model and calls."""
    if redundancy is None:
        return dict(facts)
    known = {
        "model fingerprint": redundancy.model,
        "calls fingerprint": redundancy.calls,
        "analysed": f"{redundancy.calls_used} calls, {redundancy.samples_used} samples",
    }
    return {**facts, **{name: value for name, value in known.items() if name not in facts}}


def analysis_cards(redundancy: Redundancy) -> list[tuple[str, str]]:
    """Return (value, words) pairs for a page that holds an analysis but no ratios."""
    blocks = sum(len(stack.blocks) for stack in redundancy.stacks)
    found = sum(len(stack.curves(redundancy.stream).candidates) for stack in redundancy.stacks)
    return [
        (quantity(redundancy.teacher_params), "parameters"),
        (str(blocks), f"blocks in {len(redundancy.stacks)} stack" + "s" * (len(redundancy.stacks) != 1)),
        (str(found), "candidate intervals"),
        (str(redundancy.calls_used), "calls analysed"),
    ]
