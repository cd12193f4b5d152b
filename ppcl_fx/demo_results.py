"""What the demo does, measures and shows: record, trace, analyse, select, rewrite, distil, score, export, report.

Every step is a call of the public interface, with fixed seeds.
"""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

import ppcl_fx
from ppcl_fx.calls.store import Calls
from ppcl_fx.demo import SEED, DemoSettings, fitting_steps
from ppcl_fx.export import EngineTransformer, ExportConfig, Translations, export, lower
from ppcl_fx.export.one_graph import Exported
from ppcl_fx.export.onnx.writer import weight_bytes
from ppcl_fx.export.tensorrt.request import load_onnx
from ppcl_fx.export.verify.onnx_runner import latency, session
from ppcl_fx.io.files import write_json
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.student_folder import NAME as FINETUNED
from ppcl_fx.model.student_folder import FinetunedFolder
from ppcl_fx.report import PictureGrid, write_report
from ppcl_fx.report.machine import describe
from ppcl_fx.report.results import write_contact_sheet
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.shapes.captions import CATEGORIES, every_prompt
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.shapes.score import Drawn, score_pictures, summarise
from ppcl_fx.tracing import bind
from ppcl_fx.train import StageCurves, train
from ppcl_fx.train.config import Weights

SHOWN = 2  # prompts of each category in the grid of pictures
ROUNDS = 15  # runs of each exported file that are timed
FEW_BITS = {"int8": 0.003, "int4": 0.015}  # weights of the smallest ratio, and the error they may add to its output
EMA = 0.995
BETAS = (0.9, 0.99)  # of fine-tuning: its gradients are noisy, and a longer memory of their squares steadies them
LEADS = {
    "ppcl": "Pruned by the paper's method: candidate intervals, non-sequential distillation, fine-tuning at the end.",
    "uniform": "A control: evenly spaced blocks removed, whatever they do; the same budget, training and steps.",
    "sequential": "A control: each student distilled on what the students before it give; the same plan and steps.",
}


@dataclass
class Clock:
    """Prints each stage with its seconds, and keeps them."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; what is said to the yielded function stands beside its seconds."""
        said: list[str] = []
        begin = time.perf_counter()
        with self.console.status(f"{name} ..."):
            yield said.append
        spent = self.seconds[name] = round(time.perf_counter() - begin, 1)
        self.console.print(f"{name:<10} {spent:7.1f} s   {'; '.join(said)}", highlight=False, soft_wrap=True)


def run(settings: DemoSettings, command: str) -> None:
    """Run the pipeline, write everything to ``settings.out``, and print its stages and two tables.

    ``command`` is the command line, for the report. Raises PpclError where a setting makes no sense.
    """
    out, own = settings.out, settings.weights
    console = Console()
    clock = Clock(console)
    with clock.stage("load") as say:
        pipeline = load_pipeline() if own is None else ShapesPipeline.from_pretrained(own)
        pipeline.set_progress_bar_config(disable=True)
        say(f"{sum(p.numel() for p in pipeline.transformer.parameters()):,} parameters")
    calls, analysis, plan, model = _prune(settings, clock, pipeline)
    curves, finetuned = _train(settings, clock, model, calls)
    with clock.stage("export") as say:
        files = export_ratios(out, model, settings.keeps, finetuned, calls)
        engines = measured(files, calls)
        say(f"{len(files)} ONNX files, each checked on {len(files[0].done.parity)} shapes")
    with clock.stage("score") as say:
        rows = score_files(pipeline, files, settings.per_category)
        say(", ".join(f"{row.file.name} {row.score['overall']:.3f}" for row in rows))
    with clock.stage("report"):
        blocks = sum(len(stack.blocks) for stack in analysis.stacks)
        ratios = summary(rows, engines, model, blocks)
        grid = picture_grid(rows)
        write_contact_sheet(out / "pictures", grid)
        write_report(
            out / "report.html",
            redundancy=analysis,
            plan=plan,
            losses={stage.label: stage.losses for stage in curves},
            ratios=ratios,
            pictures=grid,
            title="shapes: one teacher, and what is left of it",
            lead=LEADS[settings.variant],
            provenance=provenance(command, clock.seconds),
        )
        write_json(out / "summary.json", ratios)
    for table in tables(ratios):
        console.print(table)


def _prune(
    settings: DemoSettings, clock: Clock, pipeline: ShapesPipeline
) -> tuple[Calls, Redundancy, Plan, PluggableModel]:
    """Record every prompt there is, with other noise than that of the scores; trace, analyse, select and rewrite."""
    with clock.stage("record") as say:
        texts = [prompt.text for category in CATEGORIES for prompt in every_prompt(category)] * settings.recorded
        random.Random(SEED).shuffle(texts)
        calls = ppcl_fx.record(pipeline, texts, batch_size=settings.batch, seed=SEED)
        calls.save(settings.out / "calls")
        say(f"{len(calls)} calls of {settings.batch} samples, from {len(texts)} prompts")
    with clock.stage("trace") as say:
        gm = ppcl_fx.trace(pipeline.transformer, calls.examples())
        say(f"{len(gm.graph.nodes)} nodes, {sum(len(stack.blocks) for stack in ppcl_fx.stacks(gm))} blocks")
    some = calls[:: max(1, len(calls) // settings.analysed)]
    with clock.stage("analyze") as say:
        analysis = ppcl_fx.analyze(gm, some)
        analysis.save(settings.out / "analysis.json")
        found = sum(len(stack.curves(analysis.stream).candidates) for stack in analysis.stacks)
        say(f"{analysis.calls_used} calls, {found} candidate intervals")
    with clock.stage("select") as say:
        uniform = settings.variant == "uniform"
        options = {"rule": "uniform", "width": False} if uniform else {"rule": "paper"}
        plan = ppcl_fx.select(analysis, keep=min(settings.keeps), **options)
        write_json(settings.out / "plan.json", plan)
        say(f"{plan.params:,} of {plan.teacher_params:,} parameters stay; {len(plan.edits)} edits")
    with clock.stage("rewrite"):
        model = ppcl_fx.rewrite(gm, plan, some)
    return calls, analysis, plan, model


def _train(
    settings: DemoSettings, clock: Clock, model: PluggableModel, calls: Calls
) -> tuple[list[StageCurves], GraphModule]:
    """Distil depth and width, fine-tune the smallest mixture, save both; return the curves and the fine-tuned model."""
    steps = fitting_steps(settings.steps, {edit.kind for edit in model.plan.edits})
    folder = settings.out / "train"
    curves: list[StageCurves] = []
    common: dict[str, Any] = {
        "out": folder, "seed": SEED, "sequential": settings.variant == "sequential", "weights": Weights(relative=1.0),
    }  # fmt: skip
    distil: dict[str, Any] = {"batch": settings.distil_calls, "lr": settings.lr}
    finetune = {"batch": settings.finetune_calls, "lr": settings.finetune_lr, "ema": EMA, "betas": BETAS}
    for name, stages, own in (("distil", ("depth", "width"), distil), ("finetune", ("finetune",), finetune)):
        with clock.stage(name) as say:
            some = {stage: steps[stage] for stage in stages}
            trained = train(model, calls, stages=stages, steps=some, finetune_lr=own["lr"], **common, **own)
            curves += trained.stages
            say(", ".join(f"{one.label} {one.steps} steps in {one.seconds:.0f} s" for one in trained.stages))
    assert trained.finetuned_model is not None
    student = model.save(settings.out / "student")
    shutil.copytree(folder / FINETUNED, student / FINETUNED)  # where `ppcl-fx train` writes it, and export looks
    return curves, trained.finetuned_model


@dataclass(frozen=True)
class ExportedFile:
    """One exported file, and the graph that it was made from."""

    keep: float  # as it was asked for
    done: Exported
    graph: GraphModule
    finetuned: bool = False
    weights: str = "stored"

    @property
    def name(self) -> str:
        """The row's name in tables."""
        if self.keep >= 1:
            return "teacher"
        few = "" if self.weights == "stored" else f", {self.weights.upper()}"
        return f"{self.keep:.0%}" + (", fine-tuned" if self.finetuned else "") + few


@dataclass(frozen=True)
class Row:
    """One file that was scored: a row of the table."""

    file: ExportedFile
    drawn: list[Drawn]
    score: dict[str, float]


def score_files(pipeline: ShapesPipeline, files: Sequence[ExportedFile], per_category: int) -> list[Row]:
    """Score each file, in onnxruntime in the place of the pipeline's transformer, all on the same prompts and noise.

    The teacher is ``keep=1.0``: every edit switched back. The pipeline gets its own transformer back.
    """
    own, rows = pipeline.transformer, []
    try:
        for file in files:
            folder, keep = file.done.onnx.parent, file.done.keep
            pipeline.transformer = EngineTransformer(folder, keep=keep, backend="onnxruntime", device="cpu")
            drawn = score_pictures(pipeline, per_category)
            rows.append(Row(file, drawn, summarise(drawn)))
    finally:
        pipeline.transformer = own
    return rows


def blocks_left(model: PluggableModel, students: Sequence[str], blocks: int) -> int:
    """Return how many of a teacher's `blocks` blocks a mixture has; a student counts as one."""
    edits = [edit for edit in model.plan.edits if isinstance(edit, DepthEdit) and edit.id in students]
    return blocks - sum(edit.last - edit.first for edit in edits)


def export_ratios(
    out: Path, model: PluggableModel, keeps: Sequence[float], finetuned: GraphModule, calls: Calls
) -> list[ExportedFile]:
    """Export `model` at each ratio, the fine-tuned model, and the smallest ratio with weights in few bits, to ONNX."""
    known = Translations()  # blocks of one structure are translated once for all files
    done = export(model, out / "engines", ExportConfig(keep=tuple(keeps)), calls=calls[:1], known=known).ratios
    graphs = [model.plug(keep=keep).graph_module() for keep in keeps]
    found = [ExportedFile(*row) for row in zip(keeps, done, graphs, strict=True)]
    tuned = FinetunedFolder.open(out / "student" / FINETUNED)
    done = export(tuned, out / "engines-finetuned", calls=calls[:1], known=known).ratios
    found.append(ExportedFile(keeps[-1], done[0], finetuned, finetuned=True))
    for weights, error in FEW_BITS.items():
        how: dict[str, Any] = {"keep": keeps[-1:], "weights": weights, "weight_error": error, "check_calls": 1}
        done = export(model, out / f"engines-{weights}", calls=calls, known=known, **how).ratios
        found.append(ExportedFile(keeps[-1], done[0], graphs[-1], weights=weights))
    return found


def measured(files: Sequence[ExportedFile], calls: Calls) -> list[dict[str, float]]:
    """Time all files in turn, so that whatever else the machine does falls on all of them alike.

    For each it returns ``latency_ms`` (median of one call with the samples of a recorded one), ``parity_max_abs``
    (largest difference between onnxruntime and PyTorch over all shapes) and ``weight_bytes``.
    """
    feeds = [lower(file.graph).feeds(bind(file.graph, calls[0].kwargs)) for file in files]
    running = [session(file.done.onnx) for file in files]
    rounds = [
        [latency(one, given, runs=1, warmup=1) for one, given in zip(running, feeds, strict=True)]
        for _ in range(ROUNDS)
    ]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return [
        {
            "latency_ms": median,
            "parity_max_abs": max(file.done.parity.values()),
            "weight_bytes": weight_bytes(load_onnx(file.done.onnx)),
        }
        for median, file in zip(medians, files, strict=True)
    ]


def picture_grid(rows: Sequence[Row]) -> PictureGrid:
    """Return the first pictures of each category, prompts down, models across."""
    places: list[int] = []
    for category in CATEGORIES:
        places += [i for i, d in enumerate(rows[0].drawn) if d.prompt.category == category][:SHOWN]
    return PictureGrid(
        [rows[0].drawn[i].prompt.text for i in places],
        [row.file.name for row in rows],
        [[to_image(row.drawn[i].picture) for row in rows] for i in places],
        [[bool(row.drawn[i].score) for row in rows] for i in places],
    )


def to_image(picture: torch.Tensor) -> Any:
    """Return pixels (3, height, width) in [-1, 1] as a PIL image."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def summary(
    rows: Sequence[Row], engines: Sequence[Mapping[str, Any]], model: PluggableModel, blocks: int
) -> list[dict[str, Any]]:
    """Return the objects of summary.json: one a row, the teacher first; drop and speed-up are against the teacher."""
    teacher, first = rows[0].score["overall"], engines[0]["latency_ms"]
    return [
        {
            "name": row.file.name,
            "keep": row.file.keep,
            "finetuned": row.file.finetuned,
            "weights": row.file.weights,
            "params": row.file.done.params,
            "weight_bytes": engine["weight_bytes"],
            "blocks": blocks_left(model, row.file.done.students, blocks),
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
    sizes = Table()
    scores = Table(title="Score: share of pictures that the checker accepts", title_justify="left")
    all_scores = (*CATEGORIES, "overall")
    columns = ("parameters", "MiB", "blocks", "score", "drop", "ms", "speed-up", "parity")
    for shown, names in ((sizes, columns), (scores, all_scores)):
        shown.add_column("model")
        for name in names:
            shown.add_column(name.replace("_", "\n"), justify="right")
    for ratio in ratios:
        score = ratio["score"]
        sizes.add_row(
            ratio["name"],
            f"{ratio['params']:,}",
            f"{ratio['weight_bytes'] / 2**20:.1f}",
            str(ratio["blocks"]),
            f"{score['overall']:.3f}",
            "-" if ratio["drop_pct"] is None else f"{ratio['drop_pct']:.1f} %",
            f"{ratio['latency_ms']:.1f}",
            f"{ratio['speedup']:.2f}x",
            f"{ratio['parity_max_abs']:.0e}",
        )
        scores.add_row(ratio["name"], *(f"{score[name]:.2f}" for name in all_scores))
    return [sizes, scores]
