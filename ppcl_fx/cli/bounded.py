"""`ppcl-fx train --memory-limit`: students trained a few at a time, the teacher read from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import parse_device
from ppcl_fx.cli.stage_words import stage_lines, stage_rows
from ppcl_fx.cli.teacher import open_calls
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size

if TYPE_CHECKING:
    from ppcl_fx.train.bounded.trainer import BoundedResult
    from ppcl_fx.train.config import TrainConfig

REPORT = "report.html"


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


def run_bounded(
    student: Path, calls: Path, config: TrainConfig, limits: Limits, resume: bool, terminal: Terminal
) -> Result:
    """Train, or with a dry run only say what training would take; write the report and return the results."""
    from ppcl_fx.files import inside, read_json
    from ppcl_fx.plan import Plan
    from ppcl_fx.report import write_report
    from ppcl_fx.train.bounded.trainer import BoundedTraining
    from ppcl_fx.train.config import Limits as Allowed

    recording = open_calls(calls, terminal)
    with terminal.step("training") as report:
        training = BoundedTraining(
            student,
            recording.calls,
            config,
            Allowed(memory=limits.memory, disk=limits.disk),
            resume=resume,
            device=limits.device,
        )
        if limits.dry_run:
            return Result({"student": str(student), "schedule": training.lines}, training.lines)
        for line in () if training.ended else training.lines:
            terminal.note(line)
        done = training.run(report)
    curves = {stage.label: stage.losses for stage in done.stages}
    plan = read_json(inside(student, "plan.json"), Plan)
    write_report(student / REPORT, plan=plan, losses=curves, title=f"{student.name}: training")
    return _result(student, done)


def _result(student: Path, done: BoundedResult) -> Result:
    data = {
        "student": str(student),
        "schedule": list(done.lines),
        "losses": str(done.losses),
        "report": str(student / REPORT),
        "seconds": round(done.seconds, 3),
        "stages": stage_rows(done.stages),
        "stopped": done.stopped,
    }
    lines = stage_lines(done.stages)
    return Result(data, [*lines, f"report: {student / REPORT}"])
