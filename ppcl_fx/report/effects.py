"""What each student does to the output, and predicted against measured error for several sizes of the model."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl_fx.report.html import Html, quantity, section, table, tag
from ppcl_fx.report.svg import Series, figure, line_chart
from ppcl_fx.schema.measured_effects import Effect, Effects, Mixture


def effects_section(effects: Effects) -> Html:
    """Return a table of the edits' effects and, where mixtures were measured, their chart and table."""
    calls = len(effects.measured_on)
    lead = (
        "Squared error of the model's output against the teacher's, as a share of the teacher's square, measured on "
        f"{calls} call{'' if calls == 1 else 's'} with {effects.samples} samples. Predicted is the sum of the "
        "effects of the edits plugged, each measured alone; measured is the mixture itself."
    )
    mixtures = [_chart(effects.mixtures), _mixtures(effects.mixtures)] if effects.mixtures else []
    edits = table(
        ["edit", "effect", "held-out loss"],
        [_edit(effect) for effect in sorted(effects.edits, key=lambda effect: -effect.error)],
        "The most harmful first.",
    )
    return section("effects", "Effects on the output", lead, mixtures, tag("h3", "Each edit alone"), edits)


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
    return figure(drawn, "The scale is logarithmic; an error of zero has no place on it.", series)


def _mixtures(mixtures: Sequence[Mixture]) -> Html:
    rows = [
        (
            f"{one.keep:.4g}",
            quantity(one.params),
            len(one.students),
            f"{one.predicted:.4g}",
            f"{one.measured:.4g}",
            f"{one.measured / one.predicted:.2f}" if one.predicted > 0 else "–",
        )
        for one in mixtures
    ]
    names = ["keep", "parameters", "edits plugged", "predicted", "measured", "measured / predicted"]
    return table(names, rows, "The edits plugged are those with the least summed effect for each share.")


def _edit(effect: Effect) -> tuple[list[str | Html], str, str]:
    added = f" added to {', '.join(effect.on)}" if effect.on else ""
    loss = f"{effect.loss:.4g}" if effect.loss is not None else "–"
    return [effect.edit, tag("small", added)], f"{effect.error:.4g}", loss
