"""`ppcl-fx train`: distil the students of a pluggable model, and fine-tune one mixture of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.bounded import Limits, run_bounded
from ppcl_fx.cli.options import (
    Device,
    Json,
    MemoryLimit,
    Verbose,
    check_folder,
    choices,
    given,
    parse_counts,
    parse_keep,
    refuse_given,
)
from ppcl_fx.cli.stage_words import stage_lines, stage_rows
from ppcl_fx.cli.teacher import open_student
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.cli.training_data import Given
from ppcl_fx.cli.watching import watching
from ppcl_fx.errors import PpclError
from ppcl_fx.files import check_writable
from ppcl_fx.owned import REPORT_MARK, check_file
from ppcl_fx.sources import holds_config

if TYPE_CHECKING:
    from ppcl_fx.effects import Effects
    from ppcl_fx.train import TrainResult
    from ppcl_fx.train.config import TrainConfig
    from ppcl_fx.train.ranks import Ranks

STAGES = ("depth", "width", "finetune")
REPORT = "report.html"


def train(
    context: typer.Context,
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="What 'ppcl-fx rewrite' wrote.")],
    calls: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Recorded calls of the teacher: RUN/calls.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Or prompts, one a line, that the teacher draws as it goes.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Or pictures with captions: metadata.jsonl or .tar shards.")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher's pipeline, for --prompts and --images.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Options as TOML, such as the train.toml of a run; options given here win."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Stages, with commas: some of depth,width,finetune.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="COUNTS", help="Steps of each stage, in the same order; 600,200,100 if left out."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Share of the mixture to fine-tune; all students if left out."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Calls in one forward pass.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Forward and backward passes in one step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of depth and width.")] = None,
    finetune_lr: Annotated[float | None, typer.Option(help="Peak learning rate of finetune.")] = None,
    warmup: Annotated[str | None, typer.Option(metavar="STEPS", help="Warm-up steps; a twentieth if left out.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or adamw8bit with bitsandbytes.")] = None,
    betas: Annotated[str | None, typer.Option(metavar="A,B", help="AdamW's betas.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    clip: Annotated[str | None, typer.Option(metavar="NORM", help="Largest gradient norm of an edit; none")] = None,
    ema: Annotated[
        str | None, typer.Option(metavar="DECAY", help="The result is an average of the weights; none")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; 42 if left out.")] = None,
    sequential: Annotated[
        bool | None,
        typer.Option("--sequential/--no-sequential", help="Feed each student the one before it (a control)."),
    ] = None,
    autocast: Annotated[
        bool | None, typer.Option("--autocast/--no-autocast", help="bf16 matrix products; float32 on CUDA has them.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing: less memory, more time."),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile of the student blocks.")
    ] = None,
    compile_backend: Annotated[str | None, typer.Option(help="torch.compile's backend.")] = None,
    recorded: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Use recorded outputs: exact (where equal), always, never.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="TERMS", help="Weights of loss terms, such as relative=1,attention=0.1.")
    ] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the calls that is never trained on.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations on them.")] = None,
    patience: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Evaluations without gain until a student stops, or none.")
    ] = None,
    min_gain: Annotated[float | None, typer.Option(help="Share of the best loss that counts as a gain.")] = None,
    score_prompts: Annotated[
        int | None, typer.Option(min=0, help="Pictures a category scored at evaluations ('shapes' only).")
    ] = None,
    effects: Annotated[
        int | None,
        typer.Option(min=0, metavar="CALLS", help="Measure each student's effect on the output on so many calls."),
    ] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    log: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the logs; STUDENT/logs if left out.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(min=1, help="Steps between lines of log.jsonl.")] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="TensorBoard events; where it is installed if left out."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, to the bit.")
    ] = False,
    memory_limit: MemoryLimit = None,
    disk_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk that --memory-limit may use; what is free if left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what memory, disk, FLOPs and time training would take.")
    ] = False,
    device: Device = "cpu",
    rank_timeout: Annotated[
        float,
        typer.Option(min=1, max=1e7, metavar="SECONDS", help="How long ranks (torchrun) wait for each other."),
    ] = 600.0,
    verbose: Verbose = False,
    json: Json = False,
) -> Result | None:
    """Train STUDENT's students in place; checkpoints, logs, loss curves and the fine-tuned model go to its folder.

    Start it with torchrun or accelerate launch to train on several GPUs. Ctrl-C and SIGTERM save first. The complete
    options of the run are written to STUDENT/train.toml.
    """
    data = Given(calls, prompts, images, pipeline)
    data.check()
    limits = Limits.parse(memory_limit, disk_limit, dry_run, device)
    stages = choices("--stage", stage, STAGES) if stage is not None else None
    counts = parse_counts("--steps", steps) if steps is not None else None
    if counts is not None and (stages is not None or config is None):
        expected = len(stages or STAGES)
        if len(counts) != expected:
            raise PpclError(
                f"--steps {steps}: {len(counts)} numbers for {_plural(expected, 'stage')}; give one for each"
            )
    options = given(
        stages=stages, steps=counts, keep=parse_keep(keep) if keep is not None and keep != "none" else keep,
        batch=batch, accumulate=accumulate, lr=lr, finetune_lr=finetune_lr, warmup=warmup, optimizer=optimizer,
        betas=betas.split(",") if betas is not None else None, weight_decay=weight_decay, clip=clip, ema=ema,
        seed=seed, sequential=sequential, autocast=autocast, checkpointing=checkpointing, compile=compile,
        compile_backend=compile_backend, recorded=recorded, held_out=held_out, evaluate_every=evaluate_every,
        patience=patience, min_gain=min_gain, score_prompts=score_prompts, effects=effects, every=every, log=log,
        log_every=log_every, tensorboard=tensorboard,
        weights=_terms(weights) if weights is not None else None,
    )  # fmt: skip

    from ppcl_fx.train.config import UNUSED_BOUNDED, resolve

    chosen = resolve(config, **options)
    # A checkpoint of the released layout has a line of its own, when it is opened.
    check_folder(student, "what 'ppcl-fx rewrite' wrote", None if holds_config(student) else "ppcl.json")
    data.check_there()
    if limits is not None:
        refuse_given(context, sorted(UNUSED_BOUNDED), "not with --memory-limit or --dry-run; leave it out")
    check_writable(student)
    check_file(student / REPORT, mark=REPORT_MARK)
    if limits is not None:
        if calls is None:
            raise PpclError("--memory-limit and --dry-run: only with recorded calls; give --calls")
        chosen.bounded()
        return run_bounded(student, calls, chosen, limits, resume, Terminal(verbose))

    from ppcl_fx.train.ranks import joined

    with joined(rank_timeout) as ranks:
        return _run(student, data, chosen, resume, Terminal(verbose, silent=not ranks.first), ranks)


def _run(
    student: Path, data: Given, chosen: TrainConfig, resume: bool, terminal: Terminal, ranks: Ranks
) -> Result | None:
    """Train; on the first rank write the results and return them."""
    from ppcl_fx.report import write_report
    from ppcl_fx.train import train as run
    from ppcl_fx.train.checks import check_backend

    check_backend(chosen)
    model = open_student(student, terminal)
    drawn = data.open(student, model, chosen, terminal, ranks)
    with ExitStack() as stack:
        show = stack.enter_context(watching()) if ranks.first else None
        trained = run(model, drawn, out=student, config=chosen, resume=resume, watch=show)
    if not ranks.first:
        return None
    model.save_students(student)
    curves = {stage.label: stage.losses for stage in trained.stages}
    write_report(
        student / REPORT, plan=model.plan, losses=curves, effects=model.effects, title=f"{student.name}: training"
    )
    return _result(student, trained, model.effects)


def _terms(text: str) -> dict[str, str]:
    """Return name -> weight of ``image=1,relative=0.5``; the values are checked with the other options."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and sign for name, sign, _ in parts):
        raise PpclError(f"--weights {text}: give names and numbers, such as image=1,relative=0.5")
    return {name.strip(): value.strip() for name, _, value in parts}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _result(student: Path, trained: TrainResult, effects: Effects | None) -> Result:
    data = {
        "student": str(student),
        "losses": str(trained.losses),
        "checkpoints": str(trained.checkpoints),
        "finetuned": str(trained.finetuned) if trained.finetuned is not None else None,
        "effects": None if effects is None else effects.model_dump(mode="json"),
        "report": str(student / REPORT),
        "seconds": round(trained.seconds, 3),
        "stages": stage_rows(trained.stages),
    }
    lines = stage_lines(trained.stages)
    for mixture in effects.mixtures if effects is not None else ():
        measured = f"{mixture.measured:.4g} measured, {mixture.predicted:.4g} predicted"
        lines.append(f"keep {mixture.keep:g}: error of the output {measured}")
    if trained.finetuned is not None:
        lines.append(f"fine-tuned model: {trained.finetuned} (ppcl-fx export {trained.finetuned} -o ENGINES)")
    return Result(data, [*lines, f"report: {student / REPORT}"])
