"""The whole pipeline on the model that ships: ``python -m ppcl_fx.demo --out build/demo``.

Record, trace, analyse, select, rewrite, distil, export, score: every step is a call of the public interface, with fixed
seeds. Needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import write_json
from ppcl_fx.report import write_report
from ppcl_fx.report.results import write_contact_sheet

if TYPE_CHECKING:
    from rich.console import Console
    from torch.fx import GraphModule

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.schema.analysis import Redundancy
    from ppcl_fx.schema.plan import Plan
    from ppcl_fx.shapes.pipeline import ShapesPipeline
    from ppcl_fx.train import StageCurves

VARIANTS = ("ppcl", "uniform", "sequential")
KEEPS = (1.0, 0.7, 0.6, 0.5)
STEPS = (600, 60, 1500)
LEAVES = (
    "calls", "analysis.json", "plan.json", "student", "train", "engines", "pictures", "report.html", "summary.json",
)  # fmt: skip
MARK = "demo.json"
"""Says that a demo wrote what lies beside it."""
SEED = 42
EMA = 0.995
BETAS = (0.9, 0.99)
"""Of fine-tuning: its gradients are small beside their noise, and a longer memory of their squares steadies them."""
LEADS = {
    "ppcl": "Pruned by the paper's method: candidate intervals, non-sequential distillation, fine-tuning at the end.",
    "uniform": "A control: evenly spaced blocks removed, whatever they do; the same budget, training and steps.",
    "sequential": "A control: each student distilled on what the students before it give; the same plan and steps.",
}


@dataclass(frozen=True)
class DemoSettings:
    """What the demo was asked for.

    Attributes:
        out: the folder that everything is written to.
        weights: the folder of another shapes pipeline; the one that ships when None.
        steps: of the stages depth, width and finetune.
        per_category: prompts scored in each of the six categories.
        variant: "ppcl", or one of the two controls: "uniform" removes evenly spaced blocks instead of the plan,
            "sequential" distils each student on the output of the students before it.
        recorded: how often each distinct prompt is recorded, each time with other noise, for analysis and training.
        keeps: the ratios, the teacher's 1.0 first, the smallest last.
        batch: pictures drawn at once while recording, and samples in one recorded call.
        analysed: recorded calls that the analysis looks at.
        distil_calls: recorded calls in one step of distillation.
        finetune_calls: recorded calls in one step of fine-tuning.
        lr: peak learning rate of distillation.
        finetune_lr: peak learning rate of fine-tuning.
    """

    out: Path
    steps: tuple[int, int, int] = STEPS
    per_category: int = 64
    variant: str = "ppcl"
    weights: Path | None = None
    recorded: int = 4
    keeps: tuple[float, ...] = KEEPS
    batch: int = 16
    analysed: int = 48
    distil_calls: int = 1
    finetune_calls: int = 1
    lr: float = 1.5e-3
    finetune_lr: float = 1e-4


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
        self.seconds[name] = round(time.perf_counter() - begin, 1)
        line = f"{name:<10} {self.seconds[name]:7.1f} s   {'; '.join(said)}"
        self.console.print(line, highlight=False, soft_wrap=True)


def run(settings: DemoSettings, console: Console, command: str = "") -> list[dict[str, Any]]:
    """Run the pipeline, write everything to ``settings.out`` and return the objects of summary.json.

    Args:
        settings: what to do.
        console: where each stage and its seconds are printed.
        command: the command line, for the report.

    Raises:
        PpclError: a setting makes no sense or the output cannot be written.
    """
    from ppcl_fx import demo_results as results

    out = settings.out
    clear(out)
    clock = Clock(console)
    pipeline = _load(settings, clock)
    calls = _record(settings, clock, pipeline)
    analysis, plan, model = _prune(settings, clock, pipeline, calls)
    curves, finetuned = _train(settings, clock, model, calls)
    with clock.stage("score") as say:
        rows = results.score_ratios(pipeline, model, settings.keeps, finetuned, settings.per_category)
        say(", ".join(f"{row.name} {row.score['overall']:.3f}" for row in rows))
    with clock.stage("export") as say:
        engines = results.export_ratios(out / "engines", model, settings.keeps, finetuned, calls)
        say(f"{len(engines)} ONNX files, each checked on {engines[0]['shapes']:.0f} shapes")
    with clock.stage("report"):
        blocks = sum(len(stack.blocks) for stack in analysis.stacks)
        ratios = results.summary(rows, engines, model, blocks)
        grid = results.picture_grid(rows)
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
            provenance=results.provenance(command, clock.seconds),
        )
        write_json(out / "summary.json", ratios)
    return ratios


def _load(settings: DemoSettings, clock: Clock) -> ShapesPipeline:
    from ppcl_fx.shapes import load_pipeline
    from ppcl_fx.shapes.pipeline import ShapesPipeline

    with clock.stage("load") as say:
        own = settings.weights
        pipeline = load_pipeline() if own is None else ShapesPipeline.from_pretrained(own)
        pipeline.set_progress_bar_config(disable=True)
        say(f"{sum(p.numel() for p in pipeline.transformer.parameters()):,} parameters")
    return pipeline


def _record(settings: DemoSettings, clock: Clock, pipeline: ShapesPipeline) -> Calls:
    """Record every prompt there is; the noise differs from that of the scores."""
    import ppcl_fx
    from ppcl_fx.shapes.captions import CATEGORIES, every_prompt

    with clock.stage("record") as say:
        texts = [prompt.text for category in CATEGORIES for prompt in every_prompt(category)] * settings.recorded
        random.Random(SEED).shuffle(texts)
        calls = ppcl_fx.record(pipeline, texts, batch_size=settings.batch, seed=SEED)
        calls.save(settings.out / "calls")
        say(f"{len(calls)} calls of {settings.batch} samples, from {len(texts)} prompts")
    return calls


def _prune(
    settings: DemoSettings, clock: Clock, pipeline: ShapesPipeline, calls: Calls
) -> tuple[Redundancy, Plan, PluggableModel]:
    """Trace, analyse, select and rewrite."""
    import ppcl_fx

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
    return analysis, plan, model


def _train(
    settings: DemoSettings, clock: Clock, model: PluggableModel, calls: Calls
) -> tuple[list[StageCurves], GraphModule]:
    """Distil depth and width, fine-tune the smallest mixture, save both; return the curves and the fine-tuned model."""
    from ppcl_fx.model.student_folder import NAME as FINETUNED
    from ppcl_fx.train import train
    from ppcl_fx.train.config import Weights

    steps = fitting_steps(settings.steps, {edit.kind for edit in model.plan.edits})
    folder, sequential = settings.out / "train", settings.variant == "sequential"
    curves: list[StageCurves] = []
    averaged: dict[str, Any] = {"ema": EMA, "betas": BETAS}
    for stages, batch, rate, more in (
        (("depth", "width"), settings.distil_calls, settings.lr, {}),
        (("finetune",), settings.finetune_calls, settings.finetune_lr, averaged),
    ):
        with clock.stage("distil" if len(stages) > 1 else "finetune") as say:
            trained = train(
                model,
                calls,
                stages=stages,
                steps={stage: steps[stage] for stage in stages},
                out=folder,
                batch=batch,
                lr=rate,
                finetune_lr=rate,
                **more,
                seed=SEED,
                sequential=sequential,
                weights=Weights(relative=1.0),
            )
            curves += trained.stages
            say(", ".join(f"{one.label} {one.steps} steps in {one.seconds:.0f} s" for one in trained.stages))
    assert trained.finetuned_model is not None
    student = model.save(settings.out / "student")
    shutil.copytree(folder / FINETUNED, student / FINETUNED)  # where `ppcl-fx train` writes it, and export looks
    return curves, trained.finetuned_model


def fitting_steps(steps: tuple[int, int, int], kinds: set[str]) -> dict[str, int]:
    """Return the steps of each stage; those of a stage that the plan has no edit for go to the other one.

    So every variant gets the same number of steps, whatever its plan holds.
    """
    depth, width, finetune = steps
    if not kinds - {"depth"}:
        return {"depth": depth + width, "width": 1, "finetune": finetune}
    if "depth" not in kinds:
        return {"depth": 1, "width": depth + width, "finetune": finetune}
    return {"depth": depth, "width": width, "finetune": finetune}


def clear(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else; mark the folder as a demo's.

    Raises:
        PpclError: `out` is a file, holds something that no demo left where this one writes, or cannot be written.
    """
    there = [out / name for name in LEAVES if os.path.lexists(out / name)]
    if there and not owned.says(out / MARK, {"kind": "demo"}):
        raise PpclError(f"{there[0]}: is there, and no demo left it; choose another --out, or remove it")
    for path in there:
        owned.check_no_link(path)
        if path.is_dir():
            owned.check_replaceable(path, owned.DEMO.folders[path.name])
    try:
        for path in there:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARK, {"kind": "demo"})
    except OSError as error:
        raise PpclError(
            f"{out}: cannot be used as output ({error.strerror}); choose another --out"
        ) from error


def parse(arguments: list[str] | None = None) -> DemoSettings:
    """Read the command line. Raises PpclError where an option's value makes no sense."""
    plain = DemoSettings(Path("build/demo"))
    parser = argparse.ArgumentParser(prog="python -m ppcl_fx.demo", description=(__doc__ or "").splitlines()[0])
    for flag, default, words in (
        ("--out", plain.out, "folder for the results (%(default)s)"),
        ("--steps", ",".join(map(str, plain.steps)), "of depth, width and fine-tuning (%(default)s)"),
        ("--per-category", plain.per_category, "prompts scored a category (%(default)s)"),
        ("--variant", plain.variant, f"one of {', '.join(VARIANTS)} (%(default)s)"),
        ("--keep", ",".join(map(str, plain.keeps)), "ratios, the teacher's 1.0 first (%(default)s)"),
        ("--recorded", plain.recorded, "recordings of each prompt (%(default)s)"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=words)
    parser.add_argument("--weights", type=Path, help="another shapes pipeline, as ppcl_fx.shapes.teach writes it")
    given = vars(parser.parse_args(arguments))
    variant = given["variant"]
    if variant not in VARIANTS:
        raise PpclError(
            f"--variant {variant}: unknown{near(variant, VARIANTS)}; it is one of {', '.join(VARIANTS)}"
        )
    for name in ("per_category", "recorded"):
        if given[name] < 1:
            raise PpclError(f"--{name.replace('_', '-')} is {given[name]}; give 1 or more")
    steps, keeps = parse_steps(given.pop("steps")), parse_keeps(given.pop("keep"))
    return DemoSettings(**given, steps=steps, keeps=keeps)


def parse_steps(text: str) -> tuple[int, int, int]:
    """Return the three numbers of "600,200,100".

    Raises:
        PpclError: they are not three whole numbers of 1 or more.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise PpclError(
            f"--steps {text}: give three numbers of 1 or more, for depth, width and fine-tuning: 600,200,100"
        )
    depth, width, finetune = (int(part) for part in parts)
    return depth, width, finetune


def parse_keeps(text: str) -> tuple[float, ...]:
    """Return the shares of "1.0,0.7,0.5": 1.0 first, then falling. Raises PpclError where they are not that."""
    try:
        keeps = tuple(float(part) for part in text.split(","))
    except ValueError:
        keeps = ()
    falling = all(after < before for before, after in itertools.pairwise(keeps))
    if len(keeps) < 2 or keeps[0] != 1.0 or not falling or keeps[-1] <= 0:
        raise PpclError(f"--keep {text}: give 1.0 (the teacher) and then falling shares above 0: 1.0,0.7,0.5")
    return keeps


def main(arguments: list[str] | None = None) -> int:
    """Run the demo from the command line; return the exit code (2: one line on stderr says what to mend)."""
    from rich.console import Console

    console = Console()
    try:
        settings = parse(arguments)
        typed = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "ppcl_fx.demo", *typed])
        begin = time.perf_counter()
        ratios = run(settings, console, command)
    except PpclError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from ppcl_fx.demo_results import tables

    for table in tables(ratios):
        console.print(table)
    print(f"{time.perf_counter() - begin:.0f} s in all. Report: {settings.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
