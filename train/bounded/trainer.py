"""Distillation of a saved pluggable model within a memory limit: what the command line calls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, inside, read_json, write_json
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.schema.curves import LOSSES, Losses, StageCurves
from ppcl_fx.schema.plan import plan_digest
from ppcl_fx.tracing import bind, with_rows
from ppcl_fx.train.bounded.costs import Speeds, measure_speeds
from ppcl_fx.train.bounded.schedule import StageSchedule
from ppcl_fx.train.bounded.stage import BoundedStage, StageContext
from ppcl_fx.train.bounded.teacher import Report
from ppcl_fx.train.checks import check_here, check_places
from ppcl_fx.train.config import NOT_BOUNDED, UNUSED_BOUNDED, Limits, TrainConfig
from ppcl_fx.train.core.checkpoints import RunIdentity

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls

RUN = "run.json"


class _Run(Record):
    """What the work folder belongs to, and once the run has ended, its result."""

    identity: RunIdentity
    ended: bool = False
    stages: tuple[StageCurves, ...] = ()

    def result(
        self, folder: Path, schedules: Sequence[StageSchedule] = (), lines: Sequence[str] = (), seconds: float = 0.0
    ) -> BoundedResult:
        """Return the result; of an edit that stopped in several stages the last one's word counts."""
        stopped = {edit: stop.reason for stage in self.stages for edit, stop in stage.stopped.items()}
        return BoundedResult(schedules, lines, self.stages, stopped, folder / LOSSES, seconds)


@dataclass(frozen=True)
class BoundedResult:
    """What a memory-bounded training gave.

    Attributes:
        schedules: one for each stage, in order; none where the run had ended before.
        lines: the schedules in words.
        stages: the curves.
        stopped: edit id -> why it ended before its last step: it has converged, or its loss was NaN and its weights
            are those after the last good step.
        losses: the file with the curves.
        seconds: wall time of this process's part.
    """

    schedules: Sequence[StageSchedule]
    lines: Sequence[str]
    stages: tuple[StageCurves, ...]
    stopped: dict[str, str]
    losses: Path
    seconds: float


class BoundedTraining:
    """Distils the students of a saved pluggable model with no more of it in memory than a limit allows.

    Each student is a problem of its own: its inputs and targets are the teacher's states at its borders (Eq. 6, 10).
    The teacher runs block by block, its weights read from disk, and these states are cached; or it runs again for
    each part of the steps where that is faster or the disk is too small. As many students train at a time as fit. The
    losses are those of `ppcl_fx.train.train` up to rounding: the calls of a batch go through a student one by one.

    A run that was killed goes on to the bit with `resume`, under other limits too. Nothing is written before `run`.
    Raises PpclError where an option makes no sense, the folder holds an unfinished run, or one of something else, the
    calls are another model's, or a file is damaged.

    Args:
        student: what `PluggableModel.save` or `rewrite_streamed` wrote, or that folder opened with other weights of the
            teacher; the students in it are replaced at the end.
        calls: recorded calls of the teacher.
        config: the options; those of fine-tuning are refused (`TrainConfig.bounded`).
        limits: of memory and disk.
        resume: go on with a run that did not end.
        device: where to compute.
        speeds: of the machine; measured when None.

    Attributes:
        ended: what the run gave, where it had ended before and `resume` is given.
    """

    def __init__(
        self,
        student: str | Path | StudentFolder,
        calls: Calls,
        config: TrainConfig | None = None,
        limits: Limits | None = None,
        *,
        resume: bool = False,
        device: str | torch.device = "cpu",
        speeds: Speeds | None = None,
    ) -> None:
        self._began = time.perf_counter()
        options, where = (config or TrainConfig()).bounded(), torch.device(device)
        check_here(options, where)
        opened = student if isinstance(student, StudentFolder) else StudentFolder.open(student)
        if calls.model and opened.model.plan.model and calls.model != opened.model.plan.model:
            raise PpclError(f"{opened.folder}: the calls were recorded from another model; record calls of its teacher")
        _check_kinds(opened.model.graph, calls)
        identity = bounded_identity(opened, calls, options)
        self._context = StageContext(opened, calls, options, limits or Limits(), identity, resume, where)
        self._speeds, work = speeds, self._context.work
        owned.check_no_link(work)
        owned.check_replaceable(work, owned.BOUNDED)
        check_places(opened.folder, None, None)
        before = read_json(inside(work, RUN), _Run) if (work / RUN).is_file() else None
        if before is not None and resume:
            before.identity.check(identity, work)
        elif before is not None and not before.ended:
            raise PpclError(f"{work}: holds a training that did not end; resume it, or remove that folder")
        self.ended = before.result(opened.folder) if before is not None and before.ended and resume else None

    @cached_property
    def schedules(self) -> list[StageSchedule]:
        """What is going to be done, stage by stage. Raises PpclError where a limit is too small, and by how much."""
        return [stage.plan(self._machine) for stage in self._stages]

    @cached_property
    def lines(self) -> list[str]:
        """The schedules in words."""
        how = self._context.capacity, self._context.base, self._machine
        return [line for plan in self.schedules for line in plan.lines(*how)]

    def run(self, report: Report = lambda done, total, label: None) -> BoundedResult:
        """Train, tell `report` how far it is, and replace the students in the folder. Raises PpclError where a limit
        is too small, the disk is full, or a call cannot be used.
        """
        if self.ended is not None:
            return self.ended
        context, work, opened = self._context, self._context.work, self._context.opened
        context.report = report
        schedules, lines = self.schedules, self.lines
        if not context.resume:
            owned.discard(work, owned.BOUNDED)
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / RUN, _Run(identity=context.identity))
        for stage, plan in zip(self._stages, schedules, strict=True):
            stage.run(plan.schedule)
            if plan.stage == "depth":
                context.fit_again()
        opened.save()
        run = _Run(identity=context.identity, ended=True, stages=tuple(stage.curves() for stage in self._stages))
        curves = Losses(plan=run.identity.plan, calls=run.identity.calls, sequential=False, stages=list(run.stages))
        curves.save(opened.folder / LOSSES)
        write_json(work / RUN, run)
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        return run.result(opened.folder, schedules, lines, time.perf_counter() - self._began)

    @cached_property
    def _machine(self) -> Speeds:
        opened, options = self._context.opened, self._context.options
        dtype = torch.bfloat16 if options.autocast else opened.model.dtype
        return self._speeds or measure_speeds(opened.folder, dtype, self._context.device)

    @cached_property
    def _stages(self) -> list[BoundedStage]:
        return [self._context.stage(number) for number in range(len(self._context.options.stages))]


def bounded_identity(opened: StudentFolder, calls: Calls, config: TrainConfig) -> RunIdentity:
    """Return what the run's checkpoints belong to: of the options those that such a run has."""
    options = {name: value for name, value in config.decisive().items() if name not in NOT_BOUNDED + UNUSED_BOUNDED}
    # Nothing but what is asked for is cast here, on any device.
    options["autocast"] = "bfloat16" if config.autocast else None
    return RunIdentity(plan=plan_digest(opened.model.plan), calls=calls.fingerprint, options=options)


def _check_kinds(graph: GraphModule, calls: Calls) -> None:
    """Raise `PpclError` where a call is of a kind that the student was not traced with."""
    examples = calls.examples()
    for kwargs in (examples, *examples.others):
        try:
            bind(graph, with_rows(graph, kwargs))
        except GuardError as error:
            reason = str(error).rpartition("; ")[0]
            raise PpclError(
                f"in bounded memory all calls are of the kind that the student was traced with, and {reason}; train "
                "without --memory-limit, or leave such calls out"
            ) from error
