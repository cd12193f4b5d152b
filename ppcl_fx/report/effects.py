"""What each student does to the output, and predicted against measured error for several sizes of the model."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl_fx.effects import Effect, Effects, Mixture
from ppcl_fx.report.html import Html, quantity, tag
from ppcl_fx.report.svg import Series, legend, line_chart


def effects_section(effects: Effects) -> Html:
    """Return a table of the edits' effects and, where mixtures were measured, their chart and table."""
    calls = len(effects.measured_on)
    lead = (
        "Squared error of the model's output against the teacher's, as a share of the teacher's square, measured on "
        f"{calls} call{'' if calls == 1 else 's'} with {effects.samples} samples. Predicted is the sum of the "
        "effects of the edits plugged, each measured alone; measured is the mixture itself."
    )
    mixtures = [_chart(effects.mixtures), _mixtures(effects.mixtures)] if effects.mixtures else []
    return tag(
        "section",
        tag("h2", "Effects on the output"),
        tag("p", lead, class_="lead"),
        mixtures,
        tag("h3", "Each edit alone"),
        _edits(effects.edits),
        id="effects",
    )


def _chart(mixtures: Sequence[Mixture]) -> Html:
    shares = [100 * mixture.keep for mixture in mixtures]
    series = [
        Series("predicted", shares, [mixture.predicted for mixture in mixtures], 0, dots=True),
        Series("measured", shares, [mixture.measured for mixture in mixtures], 1, dots=True),
    ]
    drawn = line_chart(
        series,
        title="Predicted and measured error of the output for each share of the parameters",
        x_label="% of the parameters that may stay",
        y_label="relative error",
        size=(720, 260),
        log_y=True,
        whole_x=False,
    )
    words = "The scale is logarithmic; an error of zero has no place on it."
    return tag("figure", drawn, legend([(s.name, s.colour) for s in series]), tag("figcaption", words))


def _mixtures(mixtures: Sequence[Mixture]) -> Html:
    rows = [
        tag(
            "tr",
            tag("th", f"{mixture.keep:.4g}", scope="row"),
            tag("td", quantity(mixture.params)),
            tag("td", len(mixture.students)),
            tag("td", f"{mixture.predicted:.4g}"),
            tag("td", f"{mixture.measured:.4g}"),
            tag("td", f"{mixture.measured / mixture.predicted:.2f}" if mixture.predicted > 0 else "–"),
        )
        for mixture in mixtures
    ]
    names = ["keep", "parameters", "edits plugged", "predicted", "measured", "measured / predicted"]
    return _table(names, rows, "The edits plugged are those with the least summed effect for each share.")


def _edits(edits: Sequence[Effect]) -> Html:
    rows = [
        tag(
            "tr",
            tag("th", effect.edit, tag("small", _added(effect)), scope="row"),
            tag("td", f"{effect.error:.4g}"),
            tag("td", f"{effect.loss:.4g}" if effect.loss is not None else "–"),
        )
        for effect in sorted(edits, key=lambda effect: -effect.error)
    ]
    return _table(["edit", "effect", "held-out loss"], rows, "The most harmful first.")


def _added(effect: Effect) -> str:
    return f" added to {', '.join(effect.on)}" if effect.on else ""


def _table(names: Sequence[str], rows: Sequence[Html], words: str) -> Html:
    head = tag("tr", [tag("th", name, class_="left" if i == 0 else None, scope="col") for i, name in enumerate(names)])
    table = tag("table", tag("caption", words), tag("thead", head), tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex=0)
