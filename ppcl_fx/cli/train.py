"""`ppcl-fx train`: distil the students of a pluggable model, and fine-tune one mixture of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, Seed, Verbose, choices, given, parse_counts, parse_keep
from ppcl_fx.cli.teacher import open_calls, open_student
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError

if TYPE_CHECKING:
    from ppcl_fx.train import TrainResult

STAGES = ("depth", "width", "finetune")
REPORT = "report.html"


def train(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="What 'ppcl-fx rewrite' wrote.")],
    calls: Annotated[Path, typer.Option(metavar="FOLDER", help="Recorded calls of the teacher: RUN/calls.")],
    stage: Annotated[
        str, typer.Option(metavar="NAMES", help="Stages, with commas: some of depth,width,finetune.")
    ] = ",".join(STAGES),
    steps: Annotated[
        str, typer.Option(metavar="COUNTS", help="Steps of each stage, in the same order.")
    ] = "600,200,100",
    keep: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Share of the mixture to fine-tune; all students if left out."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Calls in one step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of depth and width.")] = None,
    finetune_lr: Annotated[float | None, typer.Option(help="Peak learning rate of finetune.")] = None,
    seed: Seed = 42,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Feed each student the one before it (the paper's control).")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory, more time.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, to the bit.")
    ] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Train STUDENT's students in place; checkpoints, loss curves and the fine-tuned model are put in its folder."""
    stages = choices("--stage", stage, STAGES)
    counts = parse_counts("--steps", steps)
    if len(counts) != len(stages):
        raise PpclError(
            f"--steps {steps}: {len(counts)} numbers for {_plural(len(stages), 'stage')}; give one for each"
        )
    share = parse_keep(keep) if keep is not None else None
    check_writable(student)
    terminal = Terminal(verbose)

    from ppcl_fx.report import write_report
    from ppcl_fx.train import train as run

    model = open_student(student, terminal)
    recorded = open_calls(calls, terminal)
    recorded.check(student, model.plan.model)
    options = given(keep=share, batch=batch, lr=lr, finetune_lr=finetune_lr, every=every)
    with terminal.step("training") as report:
        trained = run(
            model,
            recorded.calls,
            stages=stages,
            steps=counts,
            out=student,
            resume=resume,
            seed=seed,
            sequential=sequential,
            checkpointing=checkpointing,
            progress=lambda name, done, total, loss: report(done, total, f"{name}, loss {loss:.4g}"),
            **options,
        )
    model.save_students(student)
    curves = {stage.label: stage.losses for stage in trained.stages}
    write_report(student / REPORT, plan=model.plan, losses=curves, title=f"{student.name}: training")
    return _result(student, trained)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _result(student: Path, trained: TrainResult) -> Result:
    stages = [
        {
            "stage": stage.label,
            "steps": stage.steps,
            "seconds": round(stage.seconds, 3),
            "first": {edit: values[0] for edit, values in stage.losses.items()},
            "last": {edit: values[-1] for edit, values in stage.losses.items()},
        }
        for stage in trained.stages
    ]
    data = {
        "student": str(student),
        "losses": str(trained.losses),
        "checkpoints": str(trained.checkpoints),
        "finetuned": str(trained.finetuned) if trained.finetuned is not None else None,
        "report": str(student / REPORT),
        "seconds": round(trained.seconds, 3),
        "stages": stages,
    }
    lines = []
    for stage in trained.stages:
        lines.append(f"{stage.label}: {stage.steps} steps, {stage.seconds:.1f} s")
        lines += [
            f"  {edit}: loss {values[0]:.4g} -> {values[-1]:.4g}" for edit, values in stage.losses.items()
        ]
    if trained.finetuned is not None:
        lines.append(f"fine-tuned model: {trained.finetuned}")
    return Result(data, [*lines, f"report: {student / REPORT}"])
