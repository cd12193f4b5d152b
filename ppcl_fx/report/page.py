"""The page around the sections: head, cards, navigation, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ppcl_fx.report.html import Html, definitions, quantity, section, tag
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.plan import Plan

# Nothing may be fetched, whatever a file from outside says: only pictures inside the page and its own style.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = Path(__file__).parent / "templates" / "style.css"
_NAMES = {
    "ratios": "Ratios",
    "pictures": "Pictures",
    "plan": "Plan",
    "analysis": "Analysis",
    "frontier": "Sizes",
    "losses": "Distillation",
    "effects": "Effects",
    "provenance": "Provenance",
}


def page(title: str, sections: Mapping[str, Html], cards: Sequence[tuple[str, str]], lead: str) -> str:
    """Return the whole document; `sections` maps an anchor of the page to its section, in the order shown."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    links = [tag("a", _NAMES.get(anchor, anchor), href=f"#{anchor}") for anchor in sections]
    nav = tag("nav", links, aria_label="Sections") if len(links) > 1 else None
    shown = [tag("div", tag("b", value), tag("span", words)) for value, words in cards]
    lines = tag("h1", title), tag("p", lead, class_="lead"), nav, tag("div", shown, class_="cards") if cards else None
    top = tag("header", *lines, class_="top")
    body = tag("body", top, tag("main", list(sections.values())), tag("footer", "Made by ppcl-fx."))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def plan_section(plan: Plan, teacher_params: int | None) -> Html:
    """Return the plan in words: sizes, the edits, and the selector's reasons."""
    whole = teacher_params or plan.teacher_params
    facts = {"parameters": f"{plan.params:,}" + (f" of {whole:,} ({plan.params / whole:.2%})" if whole else "")}
    for name, kind in (("depth", "depth"), ("FFN", "ffn"), ("text stream", "text_stream")):
        facts[name] = ", ".join(e.id.partition(":")[2] for e in plan.edits if e.kind == kind) or "none"
    why = [tag("h3", "Why"), tag("ul", [tag("li", line) for line in plan.reason], class_="reasons")]
    return section("plan", "Plan", "", definitions(facts), why if plan.reason else None)


def provenance_section(facts: Mapping[str, object], redundancy: Redundancy | None) -> Html:
    """Return where the numbers come from: what the caller says, and the fingerprints of model and calls."""
    known: dict[str, object] = dict(facts)
    if redundancy is not None:
        known.setdefault("model fingerprint", redundancy.model)
        known.setdefault("calls fingerprint", redundancy.calls)
        known.setdefault("analysed", f"{redundancy.calls_used} calls, {redundancy.samples_used} samples")
    return section("provenance", "Provenance", "", definitions(known))


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
