"""The report: one HTML file that needs no network, no script and no font from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from ppcl_fx.report.results import PictureGrid, Ratio
from ppcl_fx.report.training import Losses

if TYPE_CHECKING:
    from ppcl_fx.schema.analysis import Redundancy
    from ppcl_fx.schema.measured_effects import Effects
    from ppcl_fx.schema.plan import Plan

__all__ = ["PictureGrid", "write_report"]


class Parts(TypedDict, total=False):
    """What a report may hold; a part that is not given leaves no trace."""

    redundancy: Redundancy | None  # what the analysis found
    plan: Plan | None  # what was selected; it is marked in the analysis too
    losses: Losses | None  # stage -> edit id -> loss of each step
    effects: Effects | None  # what each student does to the output
    ratios: Sequence[Ratio] | None  # the objects of summary.json, the teacher first
    pictures: PictureGrid | None  # prompts down, ratios across
    title: str  # of the page
    lead: str  # one sentence below the title
    provenance: Mapping[str, object] | None  # where the numbers come from, shown as name and value


def write_report(path: Path, **parts: Unpack[Parts]) -> Path:
    """Write the report to `path` (whole or not at all, in place of a file of that name) and return the path.

    Raises:
        PpclError: the file cannot be written or a picture cannot be read.
    """
    from ppcl_fx.io.files import write_text
    from ppcl_fx.report import page
    from ppcl_fx.report.analysis import analysis_view
    from ppcl_fx.report.frontier import frontier_view
    from ppcl_fx.report.results import headline, ratios_view
    from ppcl_fx.report.training import effects_view, losses_view

    redundancy, plan, ratios = parts.get("redundancy"), parts.get("plan"), parts.get("ratios")
    losses, effects, facts = parts.get("losses"), parts.get("effects"), parts.get("provenance") or {}
    whole = redundancy.teacher_params if redundancy else None
    sections = {
        "ratios": ratios_view(ratios) if ratios else None,
        "pictures": parts.get("pictures"),
        "plan": plan and {"plan": plan, "whole": whole or plan.teacher_params},
        "analysis": redundancy and analysis_view(redundancy, plan),
        "frontier": redundancy and frontier_view(redundancy, plan),
        "losses": losses_view(losses) if losses else None,
        "effects": effects and effects_view(effects),
        "provenance": page.provenance(facts, redundancy) or None,
    }
    text = page.page(
        title=parts.get("title", "ppcl-fx report"),
        lead=parts.get("lead", ""),
        cards=headline(ratios) if ratios else page.analysis_cards(redundancy) if redundancy else [],
        sections={anchor: view for anchor, view in sections.items() if view is not None},
    )
    write_text(Path(path), text)
    return Path(path)
