"""What the demo measures and shows: scores, pictures, latencies, the table, summary.json and the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.report import PictureGrid
from ppcl_fx.report.machine import describe
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes.captions import CATEGORIES
from ppcl_fx.shapes.score import Drawn, score_pictures, summarise
from ppcl_fx.tracing import bind

if TYPE_CHECKING:
    from rich.table import Table

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.shapes.pipeline import ShapesPipeline

SHOWN = 2
"""Prompts of each category in the grid of pictures."""


@dataclass
class Row:
    """One model that was scored: a row of the table."""

    keep: float
    finetuned: bool
    params: int
    students: tuple[str, ...]
    drawn: list[Drawn]
    score: dict[str, float]

    @property
    def name(self) -> str:
        """The row's name in tables."""
        if self.keep >= 1:
            return "teacher"
        return f"{self.keep:.0%}" + (", fine-tuned" if self.finetuned else "")


def score_ratios(
    pipeline: ShapesPipeline,
    model: PluggableModel,
    keeps: Sequence[float],
    finetuned: GraphModule | None,
    per_category: int,
) -> list[Row]:
    """Score `model` at each ratio of `keeps`, then the fine-tuned model, all on the same prompts and noise.

    The teacher is ``keep=1.0``: every edit switched back. The pipeline gets its own transformer back.
    """
    own = pipeline.transformer

    def row(keep: float, transformer: PluggableModel, params: int, finetuned: bool) -> Row:
        pipeline.transformer = transformer
        drawn = score_pictures(pipeline, per_category)
        return Row(keep, finetuned, params, model.students, drawn, summarise(drawn))

    try:
        rows = [row(keep, model.plug(keep=keep), model.param_count(), False) for keep in keeps]
        if finetuned is not None:
            model.plug(keep=min(keeps))
            params = sum(parameter.numel() for parameter in finetuned.parameters())
            rows.append(row(min(keeps), PluggableModel(finetuned, Plan()), params, True))
    finally:
        pipeline.transformer = own
    return rows


def blocks_left(model: PluggableModel, students: Sequence[str], blocks: int) -> int:
    """Return how many of a teacher's `blocks` blocks a mixture has; a student counts as one."""
    edits = [edit for edit in model.plan.edits if isinstance(edit, DepthEdit) and edit.id in students]
    return blocks - sum(edit.last - edit.first for edit in edits)


def export_ratios(
    folder: Path, model: PluggableModel, keeps: Sequence[float], finetuned: GraphModule | None, calls: Calls
) -> list[dict[str, float]]:
    """Export `model` at each ratio and the fine-tuned model to ONNX, and time them all in turn.

    Returns:
        For each, in the order of the rows: ``latency_ms`` (median of one call with the samples of a recorded one) and
        ``parity_max_abs`` (largest difference between onnxruntime and PyTorch over ``shapes`` shapes).
    """
    from ppcl_fx.export import ExportConfig, Origin, Translations, export, export_graph, lower
    from ppcl_fx.export.store.names import graph_path, ratio_name

    known = Translations()  # blocks of one structure are translated once for all files
    done = list(export(model, folder, ExportConfig(keep=tuple(keeps)), calls=calls[:1], known=known).ratios)
    graphs = [model.plug(keep=keep).graph_module() for keep in keeps]
    if finetuned is not None:
        path = graph_path(folder, f"{ratio_name(min(keeps))}-finetuned")
        share = done[-1].params / model.teacher_params
        origin = Origin(keep=share, students=list(done[-1].students), plan=model.plan)
        done.append(export_graph(finetuned, path, calls=calls[:1], origin=origin, known=known))
        graphs.append(finetuned)
    feeds = [lower(graph).feeds(bind(graph, calls[0].kwargs)) for graph in graphs]
    medians = latencies([one.onnx for one in done], feeds)
    return [
        {"latency_ms": median, "parity_max_abs": max(one.parity.values()), "shapes": len(one.parity)}
        for median, one in zip(medians, done, strict=True)
    ]


def latencies(
    files: Sequence[Path], feeds: Sequence[Mapping[str, torch.Tensor]], rounds: int = 15
) -> list[float]:
    """Return the median milliseconds of one run of each file.

    They take turns, so that whatever else the machine does falls on all of them alike.
    """
    from ppcl_fx.export.verify.onnx_runner import latency, session

    running = [session(path) for path in files]
    times: list[list[float]] = [[] for _ in files]
    for _ in range(rounds):
        for own, one, given in zip(times, running, feeds, strict=True):
            own.append(latency(one, given, runs=1, warmup=1))
    return [statistics.median(own) for own in times]


def picture_grid(rows: Sequence[Row]) -> PictureGrid:
    """Return the first pictures of each category, prompts down, models across."""
    places: list[int] = []
    for category in CATEGORIES:
        places += [i for i, d in enumerate(rows[0].drawn) if d.prompt.category == category][:SHOWN]
    return PictureGrid(
        [rows[0].drawn[i].prompt.text for i in places],
        [row.name for row in rows],
        [[to_image(row.drawn[i].picture) for row in rows] for i in places],
        [[bool(row.drawn[i].score) for row in rows] for i in places],
    )


def to_image(picture: torch.Tensor) -> Any:
    """Return pixels (3, height, width) in [-1, 1] as a PIL image."""
    from PIL import Image

    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def summary(
    rows: Sequence[Row], engines: Sequence[Mapping[str, Any]], model: PluggableModel, blocks: int
) -> list[dict[str, Any]]:
    """Return the objects of summary.json: one a row, the teacher first; drop and speed-up are against the teacher."""
    teacher, first = rows[0].score["overall"], engines[0]["latency_ms"]
    return [
        {
            "name": row.name,
            "keep": row.keep,
            "finetuned": row.finetuned,
            "params": row.params,
            "blocks": blocks_left(model, row.students, blocks),
            "score": {name: round(value, 4) for name, value in row.score.items()},
            "drop_pct": round(100 * (1 - row.score["overall"] / teacher), 2) if teacher else None,
            "latency_ms": round(engine["latency_ms"], 3),
            "speedup": round(first / engine["latency_ms"], 3),
            "parity_max_abs": engine["parity_max_abs"],
        }
        for row, engine in zip(rows, engines, strict=True)
    ]


def provenance(command: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return where the numbers come from, for the report: command, machine, versions, date, time of each stage."""
    facts = describe(("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "ppcl-fx"))
    machine = facts["machine"]
    return {
        "command": command,
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
        "versions": [f"{name} {version}" for name, version in facts["versions"].items()],
        "date": facts["date"],
        "time": [f"{stage} {spent:.0f} s" for stage, spent in seconds.items()],
    }


def tables(ratios: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the summary as two tables for the terminal: sizes and speeds, then scores by category."""
    from rich.table import Table

    sizes = Table()
    scores = Table(title="Score: share of pictures that the checker accepts", title_justify="left")
    for shown, names in (
        (sizes, ("parameters", "blocks", "score", "drop", "ms", "speed-up", "parity")),
        (scores, (*CATEGORIES, "overall")),
    ):
        shown.add_column("model")
        for name in names:
            shown.add_column(name.replace("_", "\n"), justify="right")
    for ratio in ratios:
        score = ratio["score"]
        sizes.add_row(
            ratio["name"],
            f"{ratio['params']:,}",
            str(ratio["blocks"]),
            f"{score['overall']:.3f}",
            "-" if ratio["drop_pct"] is None else f"{ratio['drop_pct']:.1f} %",
            f"{ratio['latency_ms']:.1f}",
            f"{ratio['speedup']:.2f}x",
            f"{ratio['parity_max_abs']:.0e}",
        )
        scores.add_row(ratio["name"], *(f"{score[name]:.2f}" for name in (*CATEGORIES, "overall")))
    return [sizes, scores]
