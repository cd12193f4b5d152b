"""What the analysis found: heatmaps, Delta curves and their intervals, probe fit, text streams, FFNs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppcl_fx.report.blockmap import StackEdits, block_map
from ppcl_fx.report.heatmap import heatmap, value_range
from ppcl_fx.report.html import Html, join, section, tag
from ppcl_fx.report.svg import Series, figure, line_chart
from ppcl_fx.schema.analysis import Interval, Redundancy, StackAnalysis, StreamCurves
from ppcl_fx.schema.plan import Plan

TEXT_THRESHOLD = 0.999  # the paper's appendix 6
SIZE = (520, 230)
"""Of a small chart."""


def analysis_section(redundancy: Redundancy, plan: Plan | None) -> Html:
    """Return the analysis of every stack; with a plan, what it chose is marked beside what was found."""
    stacks = [_stack(stack, StackEdits(plan, stack), redundancy.stream) for stack in redundancy.stacks]
    lead = (
        "Detection and selection are two steps. Detection walks the Delta curves and yields candidates that "
        "cover the stack back to back; selection picks from them, or parts of them, for a budget. Blocks are "
        "counted from 0."
    )
    judged = {
        None: "what they were solved from, so a good one may only mean few tokens",
        "calls": "calls that were held out",
    }.get(redundancy.held_out, f"{redundancy.held_out} of the only call that were held out")
    fits = [tag("p", f"Fits of probes and projectors are judged on {judged}.", class_="note")]
    fits += [tag("p", words, class_="note") for words in redundancy.few]
    return section("analysis", "What the analysis found", lead, fits, stacks)


def _stack(stack: StackAnalysis, edits: StackEdits, stream: str) -> Html:
    heading = tag("h3", f"Stack {stack.name} ", tag("small", f"{len(stack.blocks)} blocks"))
    leading = stack.curves(stream)
    return join(
        heading,
        block_map(stack, leading.candidates, edits),
        _heatmaps(stack, edits),
        [_deltas(stack, name, curves, edits, curves is leading) for name, curves in stack.streams.items()],
        tag("div", _fits(stack), _text(stack, edits), _ffns(stack, edits), class_="pair"),
    )


def _heatmaps(stack: StackAnalysis, edits: StackEdits) -> Html:
    shown = {name: curves for name, curves in stack.streams.items() if curves.similarity}
    if not shown:
        return join()
    low, high = value_range([curves.similarity for curves in shown.values()])
    figures = []
    for name, curves in shown.items():
        rows = enumerate(curves.similarity[:-1])
        near = [value for i, row in rows if (value := row[i + 1]) is not None]
        mean = sum(near) / len(near) if near else 1.0
        words = f"CKA between the outputs of all pairs of blocks, {name} stream; neighbours {mean:.3f} on average"
        drawn = heatmap(curves.similarity, low, high, title=words, first=stack.first, squares=edits.intervals)
        caption = f"{name.capitalize()} stream. Neighbouring blocks: {mean:.4f} on average."
        figures.append(tag("figure", drawn, tag("figcaption", caption)))
    note = "The squares are the intervals that the plan replaces." if edits.depth else ""
    words = tag("p", "The teacher's own activations (the paper's Fig. 5). ", note, class_="note")
    return join(tag("h3", "CKA between block outputs"), words, tag("div", figures, class_="pair"))


def _deltas(stack: StackAnalysis, stream: str, curves: StreamCurves, edits: StackEdits, decides: bool) -> Html:
    if not curves.candidates:
        return tag("p", f"No candidate interval on the {stream} stream.", class_="note")
    chosen = edits.intervals if decides else []
    figures = [_delta(stack, curves, interval, _inside(chosen, interval)) for interval in curves.candidates]
    words = (
        "Delta(u, k) is how much similarity is lost when block k, too, becomes its linear probe (Eq. 4). "
        "A candidate ends where the curve stops falling (Eq. 5): the shaded part. The faint part is not used."
    )
    inner = join(tag("p", words, class_="note"), tag("div", figures, class_="many"))
    title = f"Delta curves, {stream} stream: {len(figures)} candidate" + "s" * (len(figures) != 1)
    if decides:
        return join(tag("h3", title), inner)
    return tag("details", tag("summary", title + " (not used to decide)"), inner)


def _delta(stack: StackAnalysis, curves: StreamCurves, interval: Interval, selected: str) -> Html:
    start = interval.first - stack.first
    row = curves.delta[start]
    ks = [k for k in range(start + 1, len(row)) if row[k] is not None]
    shown = [k for k in ks if k <= max(interval.last - stack.first + 4, start + 6)]
    turn = interval.last - stack.first + 1
    walked, rest = [k for k in shown if k <= turn], [k for k in shown if k >= turn]
    span = f"{interval.first}–{interval.last}"
    series = [
        Series("not needed", [stack.first + k for k in rest], [row[k] for k in rest], 0, faint=True),
        Series(f"Delta({interval.first}, k)", [stack.first + k for k in walked], [row[k] for k in walked], dots=True),
    ]
    band = (interval.first + 0.85, interval.last + 0.15)
    drawn = line_chart(
        series,
        title=f"Delta from block {interval.first}: the candidate ends at block {interval.last}",
        x_label="k",
        y_label="",
        size=(230, 150),
        bands=[band],
    )
    pills = [tag("span", selected or "candidate", class_="pill yes" if selected else "pill")]
    if interval.open_ended:
        pills.append(tag("span", "open-ended", class_="pill", title="Delta fell to the end of the stack"))
    return tag("figure", tag("figcaption", f"{span} ", pills), drawn)


def _inside(chosen: Sequence[tuple[int, int]], candidate: Interval) -> str:
    """Return how much of a candidate was selected, in words; nothing where it was not."""
    parts = [(a, b) for a, b in chosen if a <= candidate.last and b >= candidate.first]
    if not parts:
        return ""
    if parts == [(candidate.first, candidate.last)]:
        return "selected"
    return "selected: " + ", ".join(f"{a}–{b}" for a, b in parts)


def _fits(stack: StackAnalysis) -> Html:
    series = [
        Series(f"{name} stream", _blocks(stack, len(curves.fit)), curves.fit, colour, dots=True)
        for colour, (name, curves) in enumerate(stack.streams.items())
    ]
    drawn = line_chart(series, title="Probe residual of each block", x_label="block", y_label="residual", size=SIZE)
    words = "Share of a block's change that its linear probe misses (Eq. 2, relative): 0 is a linear block."
    return figure(drawn, words, series, "How linear each block is")


def _text(stack: StackAnalysis, edits: StackEdits) -> Html:
    values = [None if v is None or not math.isfinite(v) else max(1.0 - v, 1e-8) for v in stack.text_similarity]
    if all(value is None for value in values):
        return join()
    blocks = _blocks(stack, len(values))
    lost = {b: v for b, v in zip(blocks, values, strict=True) if b in edits.textless}
    series = [Series("1 - CKA of the text stream", blocks, values, 2, dots=True)]
    if lost:
        series.append(Series("text stream replaced", list(lost), list(lost.values()), 1, line=False, dots=True))
    drawn = line_chart(
        series,
        title="How much each block changes the text stream",
        x_label="block",
        y_label="1 - CKA",
        size=SIZE,
        log_y=True,
        rule=1 - TEXT_THRESHOLD,
    )
    words = f"Change of the text state over each block; below the dashed line CKA is {TEXT_THRESHOLD} or more."
    return figure(drawn, words, series, "Text stream")


def _ffns(stack: StackAnalysis, edits: StackEdits) -> Html:
    if not stack.ffn:
        return join()
    replaced = {edit.block for edit in edits.ffn}
    series = []
    for colour, stream in enumerate(dict.fromkeys(fit.stream for fit in stack.ffn)):
        fits = [fit for fit in stack.ffn if fit.stream == stream]
        series.append(Series(f"{stream} FFN", [f.block for f in fits], [f.error for f in fits], colour, dots=True))
    chosen = [fit for fit in stack.ffn if fit.block in replaced]
    if chosen:
        blocks, errors = [f.block for f in chosen], [f.error for f in chosen]
        series.append(Series("replaced", blocks, errors, 6, line=False, dots=True))
    drawn = line_chart(series, title="Error of an FFN's projector", x_label="block", y_label="error", size=SIZE)
    words = "Error of the best linear projector for each FFN, relative to what the FFN adds."
    return figure(drawn, words, series, "FFN fit")


def _blocks(stack: StackAnalysis, count: int) -> list[int]:
    return [stack.first + index for index in range(count)]
