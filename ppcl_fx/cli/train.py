"""`ppcl-fx train`: distil the students of a pluggable model, and fine-tune one mixture of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from ppcl_fx.cli import options as common
from ppcl_fx.cli.analyze import read_prompts
from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import File, Folder
from ppcl_fx.cli.terminal import Terminal, watching
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import check_writable
from ppcl_fx.io.memory import parse_size
from ppcl_fx.io.options import Config, Flag, flag_of
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
Size = Annotated[str | None, Flag(metavar="SIZE")]


class Given(Config):
    """What the command line names: one of calls, prompts and images, a pipeline with the last two; a config file."""

    calls: Folder = Field(None, description="recorded calls of the teacher: RUN/calls")
    prompts: File = Field(None, description="or prompts, one a line, that the teacher draws as it goes")
    images: Annotated[Path | None, Flag(metavar="PATH")] = Field(
        None, description="or pictures with captions: metadata.jsonl or .tar shards"
    )
    pipeline: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        None, description="the teacher's pipeline, for --prompts and --images"
    )
    config: File = Field(None, description="options as TOML, such as the train.toml of a run; options given here win")

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
        common.check_folder(self.calls, "recorded calls", "index.json")
        common.check_file(self.prompts, "a text file, one prompt a line")
        common.check_file(self.images, "a folder of pictures, or a shard")
        if self.pipeline is not None:
            check_source(self.pipeline)

    def open(
        self, student: Path, model: PluggableModel, options: TrainConfig, terminal: Terminal, ranks: ProcessGroup
    ) -> Calls | DataSource:
        """Open the data, all ranks together; recordings and encoded pictures are kept in the student's folder."""
        if self.calls is not None:
            recording = common.open_calls(self.calls, terminal)
            recording.check(student, model.plan.model)
            return recording.calls
        from ppcl_fx.model.sources import open_source
        from ppcl_fx.train.distributed.process_group import Place

        assert self.pipeline is not None
        pipeline = common.open_pipeline("--pipeline", open_source(self.pipeline), student, model.plan.model, terminal)
        place = Place(model.device, model.dtype, ranks)
        if self.prompts is not None:
            from ppcl_fx.train.data.prompts import PromptSource

            texts = read_prompts(self.prompts)
            return PromptSource(pipeline, texts, student / RECORDED, options.batch, options.seed, place)
        from ppcl_fx.train.images.encode import Encoder
        from ppcl_fx.train.images.images import open_images

        assert self.images is not None
        encoder, where, how = Encoder(pipeline), student / ENCODED, (options.batch, options.seed)
        with terminal.step("encoding the pictures") as report:
            return open_images(encoder, self.images, where, *how, place=place, progress=report)


class Within(Config):
    """What a run with its weights left on disk may use, and where it computes."""

    memory_limit: Size = Field(
        None, description="leave the weights on disk and work block by block within this much memory, such as 12GiB"
    )
    disk_limit: Size = Field(None, description="disk that --memory-limit may use; what is free if left out")
    device: Annotated[str, Flag(metavar="DEVICE")] = Field(
        "cpu", description="where --memory-limit computes: 'cpu', 'cuda'"
    )

    def limits(self, bounded: bool) -> Limits:
        """Return what was asked for in bytes. Raises PpclError where the run is not `bounded`."""
        common.check_device(self.device, bounded)
        if self.disk_limit is not None and not bounded:
            raise PpclError("--disk-limit: only with --memory-limit or --dry-run; give one of them too")
        given = {"memory": self.memory_limit, "disk": self.disk_limit}
        return Limits(**{n: parse_size(f"--{n}-limit", text) for n, text in given.items() if text is not None})


@flagged
def train(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="What 'ppcl-fx rewrite' wrote.")],
    options: Annotated[dict[str, Any], TrainConfig],
    terminal: Terminal,
    data: Given,
    within: Within,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, to the bit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what memory, disk, FLOPs and time training would take.")
    ] = False,
    rank_timeout: Annotated[
        float, typer.Option(min=1, max=1e7, metavar="SECONDS", help="How long ranks (torchrun) wait for each other.")
    ] = 600.0,
) -> CommandResult | None:
    """Train STUDENT's students in place; checkpoints, logs, loss curves and the fine-tuned model go to its folder.

    Start it with torchrun or accelerate launch to train on several GPUs. Ctrl-C and SIGTERM save first. The complete
    options of the run are written to STUDENT/train.toml.
    """
    data.check()
    bounded = dry_run or within.memory_limit is not None
    limits = within.limits(bounded)
    chosen = resolve(data.config, **options)
    # A checkpoint of the released layout has a line of its own, when it is opened.
    common.check_folder(student, "what 'ppcl-fx rewrite' wrote", None if holds_config(student) else "ppcl.json")
    data.check_there()
    if bounded:
        for name in sorted(set(UNUSED_BOUNDED) & options.keys()):
            raise PpclError(f"{flag_of(TrainConfig, name)}: not with --memory-limit or --dry-run; leave it out")
    check_writable(student)
    check_replaceable(student / REPORT, mark=REPORT_MARK)
    if bounded:
        if data.calls is None:
            raise PpclError("--memory-limit and --dry-run: only with recorded calls; give --calls")
        chosen.bounded()
        from ppcl_fx.train.bounded.trainer import BoundedTraining

        recording = common.open_calls(data.calls, terminal)
        with terminal.step("training") as report:
            training = BoundedTraining(student, recording.calls, chosen, limits, resume=resume, device=within.device)
            if dry_run:
                return CommandResult({"student": str(student), "schedule": training.lines}, training.lines)
            for line in () if training.ended else training.lines:
                terminal.note(line)
            return _bounded_result(student, training.run(report))

    from ppcl_fx.train.distributed.process_group import joined

    with joined(rank_timeout) as ranks:
        return _run(student, data, chosen, resume, Terminal(terminal.verbose, silent=not ranks.first), ranks)


def _run(
    student: Path, data: Given, chosen: TrainConfig, resume: bool, terminal: Terminal, ranks: ProcessGroup
) -> CommandResult | None:
    """Train; on the first rank write the results and return them."""
    from ppcl_fx.train import train as run
    from ppcl_fx.train.checks import check_backend

    check_backend(chosen)
    model = common.open_student(student, terminal)
    drawn = data.open(student, model, chosen, terminal, ranks)
    with watching() if ranks.first else nullcontext() as show:
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


def _bounded_result(student: Path, done: BoundedResult) -> CommandResult:
    from ppcl_fx.io.files import inside, read_json
    from ppcl_fx.schema.plan import Plan

    found = _report(student, read_json(inside(student, "plan.json"), Plan), done.stages) | {
        "schedule": list(done.lines),
        "losses": str(done.losses),
        "stopped": done.stopped,
        "seconds": round(done.seconds, 3),
    }
    return CommandResult(found, _stage_lines(student, done.stages))


def _report(
    student: Path, plan: Plan, stages: Sequence[StageCurves], effects: Effects | None = None
) -> dict[str, Any]:
    """Write the report of a training, and return what both schedules say of it in JSON."""
    from ppcl_fx.report import write_report

    curves = {stage.label: stage.losses for stage in stages}
    write_report(student / REPORT, plan=plan, losses=curves, effects=effects, title=f"{student.name}: training")
    rows = [
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
    return {"student": str(student), "report": str(student / REPORT), "stages": rows}


def _stage_lines(student: Path, stages: Iterable[StageCurves]) -> list[str]:
    """Return a line for each stage, under it one for each student, and where the report is."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.label}: {stage.steps} steps, {stage.seconds:.1f} s")
        for edit, values in stage.losses.items():
            held_out, stop = stage.held_out.get(edit), stage.stopped.get(edit)
            more = f", held-out {held_out[-1][1]:.4g}" if held_out else ""
            more += f"; stopped, {stop.reason}" if stop else ""
            lines.append(f"  {edit}: loss {values[0]:.4g} -> {values[-1]:.4g}{more}")
    return [*lines, f"report: {student / REPORT}"]
