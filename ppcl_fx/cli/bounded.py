"""`ppcl-fx train --memory-limit`: students trained a few at a time, the teacher read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import parse_device
from ppcl_fx.cli.stage_words import stage_lines, stage_rows
from ppcl_fx.cli.teacher import open_calls
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size

if TYPE_CHECKING:
    from ppcl_fx.train.bounded.options import BoundedOptions, BoundedResult
    from ppcl_fx.train.options import Options

REPORT = "report.html"
LOGGING = {"log", "log_every", "tensorboard", "finetune_lr", "recorded"}
"""Options that are about what this way of training does not do."""


@dataclass(frozen=True)
class Limits:
    """What the command line says of memory: sizes in bytes, None where not given."""

    memory: int | None
    disk: int | None
    dry_run: bool
    device: str

    @classmethod
    def parse(cls, memory: str | None, disk: str | None, dry_run: bool, device: str) -> Limits | None:
        """Return the limits, or None where nothing asks for this way of training.

        Raises:
            PpclError: a size is no size, there is no such device, or an option is given that needs another.
        """
        where = parse_device(device, "none" if dry_run else memory)
        if memory is None and not dry_run:
            if disk is not None:
                raise PpclError("--disk-limit: only with --memory-limit or --dry-run; give one of them too")
            return None
        return cls(
            parse_size("--memory-limit", memory) if memory is not None else None,
            parse_size("--disk-limit", disk) if disk is not None else None,
            dry_run,
            where,
        )


def bounded_options(chosen: Options, stages_given: bool) -> BoundedOptions:
    """Return the options of a run in bounded memory; without stages of its own it leaves fine-tuning out.

    Raises:
        PpclError: an option is set that this way of training does not have.
    """
    from ppcl_fx.train.bounded.options import BoundedOptions

    known, plain = set(BoundedOptions.model_fields), type(chosen)()
    for name in type(chosen).model_fields:
        if name not in known | LOGGING and getattr(chosen, name) != getattr(plain, name):
            raise PpclError(f"training option {name}: not with --memory-limit or --dry-run; leave it out")
    left = [
        (stage, count)
        for stage, count in zip(chosen.stages, chosen.steps, strict=True)
        if stages_given or stage != "finetune"
    ]
    same: dict[str, Any] = {name: getattr(chosen, name) for name in known - {"stages", "steps", "autocast"}}
    return BoundedOptions(
        stages=tuple(stage for stage, _ in left),
        steps=tuple(count for _, count in left),
        autocast="bfloat16" if chosen.autocast else None,
        **same,
    )


def run_bounded(
    student: Path, calls: Path, options: BoundedOptions, limits: Limits, resume: bool, terminal: Terminal
) -> Result:
    """Train, or with a dry run only say what training would take; write the report and return the results."""
    from ppcl_fx.plan import Plan
    from ppcl_fx.report import write_report
    from ppcl_fx.train.bounded.trainer import train_bounded

    recording = open_calls(calls, terminal)
    with terminal.step("training") as report:
        done = train_bounded(
            student,
            recording.calls,
            options,
            memory_limit=limits.memory,
            disk_limit=limits.disk,
            dry_run=limits.dry_run,
            resume=resume,
            device=limits.device,
            tell=lambda line: None if limits.dry_run else terminal.note(line),
            report=report,
        )
    if not limits.dry_run:
        from ppcl_fx.files import inside, read_json

        curves = {stage.label: stage.losses for stage in done.stages}
        plan = read_json(inside(student, "plan.json"), Plan)
        write_report(student / REPORT, plan=plan, losses=curves, title=f"{student.name}: training")
    return _result(student, done)


def _result(student: Path, done: BoundedResult) -> Result:
    if done.losses is None:
        return Result({"student": str(student), "schedule": list(done.lines)}, list(done.lines))
    data = {
        "student": str(student),
        "schedule": list(done.lines),
        "losses": str(done.losses),
        "report": str(student / REPORT),
        "seconds": round(done.seconds, 3),
        "stages": stage_rows(done.stages),
        "stopped": done.stopped or {},
    }
    lines = stage_lines(done.stages)
    return Result(data, [*lines, f"report: {student / REPORT}"])
