"""The report: one HTML file that needs no network, no script and no font from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl_fx.report.html import Html
from ppcl_fx.report.results import PictureGrid, Ratio
from ppcl_fx.report.training import Losses

if TYPE_CHECKING:
    from ppcl_fx.schema.analysis import Redundancy
    from ppcl_fx.schema.measured_effects import Effects
    from ppcl_fx.schema.plan import Plan

__all__ = ["PictureGrid", "write_report"]


def write_report(
    path: Path,
    *,
    redundancy: Redundancy | None = None,
    plan: Plan | None = None,
    losses: Losses | None = None,
    effects: Effects | None = None,
    ratios: Sequence[Ratio] | None = None,
    pictures: PictureGrid | None = None,
    title: str = "ppcl-fx report",
    lead: str = "",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the report to `path` (whole or not at all) and return the path.

    Every part is optional, and a part that is not given leaves no trace. All text is escaped.

    Args:
        path: the file to write; a file of that name is replaced.
        redundancy: what the analysis found.
        plan: what was selected; it is marked in the analysis too.
        losses: stage -> edit id -> loss of each step.
        effects: what each student does to the output.
        ratios: the objects of summary.json, the teacher first.
        pictures: prompts down, ratios across.
        title: of the page.
        lead: one sentence below the title.
        provenance: where the numbers come from, shown as name and value.

    Raises:
        PpclError: the file cannot be written or a picture cannot be read.
    """
    from ppcl_fx.io.files import write_text
    from ppcl_fx.report.analysis import analysis_section
    from ppcl_fx.report.effects import effects_section
    from ppcl_fx.report.frontier import frontier_section
    from ppcl_fx.report.page import analysis_cards, page, plan_section, provenance_section
    from ppcl_fx.report.results import headline, pictures_section, ratios_section
    from ppcl_fx.report.training import losses_section

    sections: dict[str, Html] = {}
    if ratios:
        sections["ratios"] = ratios_section(ratios)
    if pictures is not None:
        sections["pictures"] = pictures_section(pictures)
    if plan is not None:
        sections["plan"] = plan_section(plan, redundancy.teacher_params if redundancy else None)
    if redundancy is not None:
        sections["analysis"] = analysis_section(redundancy, plan)
        sections["frontier"] = frontier_section(redundancy, plan)
    if losses:
        sections["losses"] = losses_section(losses)
    if effects is not None:
        sections["effects"] = effects_section(effects)
    if provenance or redundancy is not None:
        sections["provenance"] = provenance_section(provenance or {}, redundancy)
    sections = {anchor: section for anchor, section in sections.items() if section}
    cards = headline(ratios) if ratios else (analysis_cards(redundancy) if redundancy is not None else [])
    write_text(Path(path), page(title, sections, cards, lead))
    return Path(path)
