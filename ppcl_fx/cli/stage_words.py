"""What both ways of training say of their stages: an object each for programs, lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ppcl_fx.train import StageCurves


def stage_rows(stages: Iterable[StageCurves]) -> list[dict[str, Any]]:
    """Return the JSON object of each stage."""
    return [
        {
            "stage": stage.label,
            "steps": stage.steps,
            "seconds": round(stage.seconds, 3),
            "first": {edit: values[0] for edit, values in stage.losses.items()},
            "last": {edit: values[-1] for edit, values in stage.losses.items()},
            "held_out": {edit: values[-1][1] for edit, values in stage.held_out.items()},
            "score": stage.scores[-1][1] if stage.scores else None,
            "stopped": {edit: stop.reason for edit, stop in stage.stopped.items()},
        }
        for stage in stages
    ]


def stage_lines(stages: Iterable[StageCurves]) -> list[str]:
    """Return a line for each stage, and under it one for each student."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.label}: {stage.steps} steps, {stage.seconds:.1f} s")
        lines += [
            f"  {edit}: loss {values[0]:.4g} -> {values[-1]:.4g}{_more(stage, edit)}"
            for edit, values in stage.losses.items()
        ]
    return lines


def _more(stage: StageCurves, edit: str) -> str:
    held_out, stop = stage.held_out.get(edit), stage.stopped.get(edit)
    return (f", held-out {held_out[-1][1]:.4g}" if held_out else "") + (f"; stopped, {stop.reason}" if stop else "")
