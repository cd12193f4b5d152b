"""`ppcl-fx train`: distil the students of a pluggable model, and fine-tune one mixture of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx.cli.analyze import read_prompts
from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import check_device, check_file, check_folder
from ppcl_fx.cli.teacher import open_calls, open_pipeline, open_student
from ppcl_fx.cli.terminal import Terminal, watching
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import check_writable
from ppcl_fx.io.memory import parse_size
from ppcl_fx.io.options import flag_of
from ppcl_fx.io.owned_folders import REPORT_MARK
from ppcl_fx.io.owned_folders import check_file as check_replaceable
from ppcl_fx.model.sources import check_source, holds_config
from ppcl_fx.train.config import UNUSED_BOUNDED, Limits, TrainConfig, resolve

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.schema.measured_effects import Effects
    from ppcl_fx.schema.plan import Plan
    from ppcl_fx.train import StageCurves
    from ppcl_fx.train.bounded.trainer import BoundedResult
    from ppcl_fx.train.data.source import DataSource
    from ppcl_fx.train.distributed.process_group import ProcessGroup

REPORT, RECORDED, ENCODED = "report.html", "recorded", "encoded"

@flagged
def train(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="What 'ppcl-fx rewrite' wrote.")],
    options: Annotated[dict[str, Any], TrainConfig],
    terminal: Terminal,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, to the bit.")] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Leave the weights on disk and work block by block within this much memory, such as 12GiB.",
        ),
    ] = None,
    disk_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk that --memory-limit may use; what is free if left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what memory, disk, FLOPs and time training would take.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where --memory-limit computes: 'cpu', 'cuda'.")] = "cpu",
    rank_timeout: Annotated[
        float, typer.Option(min=1, max=1e7, metavar="SECONDS", help="How long ranks (torchrun) wait for each other.")
    ] = 600.0,
) -> CommandResult | None:
    """Train STUDENT's students in place; checkpoints, logs, loss curves and the fine-tuned model go to its folder.

    Start it with torchrun or accelerate launch to train on several GPUs. Ctrl-C and SIGTERM save first. The complete
    options of the run are written to STUDENT/train.toml.
    """
    data = Given(calls, prompts, images, pipeline)
    data.check()
    bounded = dry_run or memory_limit is not None
    check_device(device, bounded)
    if disk_limit is not None and not bounded:
        raise PpclError("--disk-limit: only with --memory-limit or --dry-run; give one of them too")
    limits = Limits(
        memory=parse_size("--memory-limit", memory_limit) if memory_limit is not None else None,
        disk=parse_size("--disk-limit", disk_limit) if disk_limit is not None else None,
    )
    chosen = resolve(config, **options)
    # A checkpoint of the released layout has a line of its own, when it is opened.
    check_folder(student, "what 'ppcl-fx rewrite' wrote", None if holds_config(student) else "ppcl.json")
    data.check_there()
    if bounded:
        for name in sorted(set(UNUSED_BOUNDED) & options.keys()):
            raise PpclError(f"{flag_of(TrainConfig, name)}: not with --memory-limit or --dry-run; leave it out")
    check_writable(student)
    check_replaceable(student / REPORT, mark=REPORT_MARK)
    if bounded:
        if calls is None:
            raise PpclError("--memory-limit and --dry-run: only with recorded calls; give --calls")
        chosen.bounded()
        from ppcl_fx.train.bounded.trainer import BoundedTraining

        recording = open_calls(calls, terminal)
        with terminal.step("training") as report:
            training = BoundedTraining(student, recording.calls, chosen, limits, resume=resume, device=device)
            if dry_run:
                return CommandResult({"student": str(student), "schedule": training.lines}, training.lines)
            for line in () if training.ended else training.lines:
                terminal.note(line)
            return _bounded_result(student, training.run(report))

    from ppcl_fx.train.distributed.process_group import joined

    with joined(rank_timeout) as ranks:
        return _run(student, data, chosen, resume, terminal.quieter(not ranks.first), ranks)


def _run(
    student: Path, data: Given, chosen: TrainConfig, resume: bool, terminal: Terminal, ranks: ProcessGroup
) -> CommandResult | None:
    """Train; on the first rank write the results and return them."""
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
    effects = model.effects
    found = _report(student, model.plan, trained.stages, effects) | {
        "losses": str(trained.losses),
        "checkpoints": str(trained.checkpoints),
        "finetuned": str(trained.finetuned) if trained.finetuned is not None else None,
        "effects": None if effects is None else effects.model_dump(mode="json"),
        "seconds": round(trained.seconds, 3),
    }
    lines = _stage_lines(student, trained.stages)
    report = lines.pop()
    for mixture in effects.mixtures if effects is not None else ():
        measured = f"{mixture.measured:.4g} measured, {mixture.predicted:.4g} predicted"
        lines.append(f"keep {mixture.keep:g}: error of the output {measured}")
    if trained.finetuned is not None:
        lines.append(f"fine-tuned model: {trained.finetuned} (ppcl-fx export {trained.finetuned} -o ENGINES)")
    return CommandResult(found, [*lines, report])


@dataclass(frozen=True)
class Given:
    """The data that the command line names: one of calls, prompts and images; a pipeline with the last two."""

    calls: Path | None
    prompts: Path | None
    images: Path | None
    pipeline: str | None

    def check(self) -> None:
        """Raise `PpclError` where not exactly one kind of data is named, or one lacks its pipeline."""
        named = [f"--{name}" for name in ("calls", "prompts", "images") if getattr(self, name) is not None]
        if len(named) != 1:
            raise PpclError(f"{' and '.join(named) or 'no data'}: give one of --calls, --prompts, --images")
        if self.calls is None and self.pipeline is None:
            raise PpclError(f"{named[0]}: needs the teacher's pipeline; give --pipeline MODEL")
        if self.calls is not None and self.pipeline is not None:
            raise PpclError("--pipeline: recorded calls need none; leave it out")

    def check_there(self) -> None:
        """Raise `PpclError` where what is named is not there, before anything slow is imported."""
        check_folder(self.calls, "recorded calls", "index.json")
        check_file(self.prompts, "a text file, one prompt a line")
        check_file(self.images, "a folder of pictures, or a shard")
        if self.pipeline is not None:
            check_source(self.pipeline)

    def open(
        self, student: Path, model: PluggableModel, options: TrainConfig, terminal: Terminal, ranks: ProcessGroup
    ) -> Calls | DataSource:
        """Open the data, all ranks together; recordings and encoded pictures are kept in the student's folder."""
        if self.calls is not None:
            recording = open_calls(self.calls, terminal)
            recording.check(student, model.plan.model)
            return recording.calls
        from ppcl_fx.model.sources import open_source
        from ppcl_fx.train.distributed.process_group import Place

        assert self.pipeline is not None
        pipeline = open_pipeline("--pipeline", open_source(self.pipeline), student, model.plan.model, terminal)
        place = Place(model.device, model.dtype, ranks)
        if self.prompts is not None:
            from ppcl_fx.train.data.prompts import PromptSource

            texts = read_prompts(self.prompts)
            return PromptSource(pipeline, texts, student / RECORDED, options.batch, options.seed, place)
        from ppcl_fx.train.images.encode import Encoder
        from ppcl_fx.train.images.images import open_images

        assert self.images is not None
        with terminal.step("encoding the pictures") as report:
            return open_images(
                Encoder(pipeline),
                self.images,
                student / ENCODED,
                options.batch,
                options.seed,
                place=place,
                progress=report,
            )


def _bounded_result(student: Path, done: BoundedResult) -> CommandResult:
    from ppcl_fx.io.files import inside, read_json
    from ppcl_fx.schema.plan import Plan

    report = _report(student, read_json(inside(student, "plan.json"), Plan), done.stages)
    more = {"schedule": list(done.lines), "losses": str(done.losses), "stopped": done.stopped}
    return CommandResult(report | more | {"seconds": round(done.seconds, 3)}, _stage_lines(student, done.stages))


def _report(
    student: Path, plan: Plan, stages: Sequence[StageCurves], effects: Effects | None = None
) -> dict[str, Any]:
    """Write the report of a training, and return what both schedules say of it in JSON."""
    from ppcl_fx.report import write_report

    curves = {stage.label: stage.losses for stage in stages}
    write_report(student / REPORT, plan=plan, losses=curves, effects=effects, title=f"{student.name}: training")
    return {"student": str(student), "report": str(student / REPORT), "stages": _stage_rows(stages)}


def _stage_rows(stages: Iterable[StageCurves]) -> list[dict[str, Any]]:
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


def _stage_lines(student: Path, stages: Iterable[StageCurves]) -> list[str]:
    """Return a line for each stage, under it one for each student, and where the report is."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.label}: {stage.steps} steps, {stage.seconds:.1f} s")
        lines += [
            f"  {edit}: loss {values[0]:.4g} -> {values[-1]:.4g}{_more(stage, edit)}"
            for edit, values in stage.losses.items()
        ]
    return [*lines, f"report: {student / REPORT}"]


def _more(stage: StageCurves, edit: str) -> str:
    held_out, stop = stage.held_out.get(edit), stage.stopped.get(edit)
    return (f", held-out {held_out[-1][1]:.4g}" if held_out else "") + (f"; stopped, {stop.reason}" if stop else "")
