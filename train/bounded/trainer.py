"""Distillation of a saved pluggable model within a memory limit: what the command line calls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError, near
from ppcl_fx.files import ROOM, read_json, write_json
from ppcl_fx.memory import anonymous
from ppcl_fx.passes.streaming.cuts import cut
from ppcl_fx.passes.streaming.footprint import call_size
from ppcl_fx.train import checkpoints
from ppcl_fx.train.bounded.cache import Cache
from ppcl_fx.train.bounded.costs import ProblemCost, TeacherCost, problem_cost, teacher_cost
from ppcl_fx.train.bounded.folder import StudentFolder, dtype_of, load_finished
from ppcl_fx.train.bounded.options import STAGES, BoundedOptions, BoundedResult, StageSchedule
from ppcl_fx.train.bounded.problems import Problem, problems
from ppcl_fx.train.bounded.schedule import Limits, Schedule, Speeds, Sweep, Work, cache_room, plan_schedule
from ppcl_fx.train.bounded.speeds import measure_speeds
from ppcl_fx.train.bounded.student import Part, Student
from ppcl_fx.train.bounded.teacher import Report, Route, Teacher, states_room
from ppcl_fx.train.bounded.words import schedule_lines
from ppcl_fx.train.checkpoints import Identity
from ppcl_fx.train.curves import LOSSES, Losses, StageCurves
from ppcl_fx.train.data import Batches
from ppcl_fx.train.finetuned import plan_digest

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.skeleton import Checkpoint

WORK = "bounded"
"""The folder, in the student's, of what a run keeps until it ends."""
RUN = "run.json"
NO_LIMIT = 2**62


def silent(done: int, total: int, label: str) -> None:
    """Say nothing."""


class _Run(BaseModel):
    """What the work folder belongs to, and once the run has ended, its result."""

    model_config = ConfigDict(extra="forbid")
    identity: Identity
    ended: bool = False
    stages: list[StageCurves] = []
    stopped: dict[str, str] = {}


def train_bounded(
    folder: str | Path,
    calls: Calls,
    options: BoundedOptions,
    *,
    memory_limit: int | None,
    disk_limit: int | None = None,
    dry_run: bool = False,
    resume: bool = False,
    device: str | torch.device = "cpu",
    teacher: Checkpoint | None = None,
    speeds: Speeds | None = None,
    tell: Callable[[str], None] = lambda line: None,
    report: Report = silent,
) -> BoundedResult:
    """Distil the students of a saved pluggable model with no more of it in memory than a limit allows.

    Each student is a problem of its own: its inputs and targets are the teacher's states at its borders (Eq. 6, 10).
    The teacher runs block by block, its weights read from disk, and these states are cached; or it runs again for each
    part of the steps where that is faster or the disk is too small. As many students train at a time as fit. The
    losses are those of `ppcl_fx.train.train` up to rounding: the calls of a batch go through a student one by one.

    A run that was killed goes on to the bit with `resume`, under other limits too.

    Args:
        folder: what `PluggableModel.save` or `rewrite_streamed` wrote; the students in it are replaced at the end.
        calls: recorded calls of the teacher.
        options: stages, steps, and what decides the numbers.
        memory_limit: bytes that this process may hold (memory-mapped weights, which the system takes back when it
            needs to, do not count). None for no limit.
        disk_limit: bytes of the student folder's disk that caches, checkpoints and results may take; what is free
            when None.
        dry_run: only make the schedule and tell it.
        resume: go on with a run that did not end.
        device: where to compute.
        teacher: the teacher's weights, where they are not those in the folder.
        speeds: of the machine; measured when None.
        tell: told the schedule line by line before anything is trained.
        report: told how far it is.

    Raises:
        PpclError: an option makes no sense, a limit is too small (the line says by how much), the folder holds an
            unfinished run, or one of something else, the calls are another model's, or a file is damaged.
    """
    began = time.perf_counter()
    _check(options)
    opened = StudentFolder.open(folder, teacher)
    if calls.model and opened.model.plan.model and calls.model != opened.model.plan.model:
        raise PpclError(f"{folder}: the calls were recorded from another model; record calls of its teacher")
    identity = Identity(
        plan=plan_digest(opened.model.plan), calls=calls.fingerprint, options=options.decisive()
    )
    work = opened.folder / WORK
    before = _before(work, identity, resume)
    if before is not None and before.ended and not dry_run:
        losses = opened.folder / LOSSES
        return BoundedResult((), (), tuple(before.stages), before.stopped, losses, 0.0)
    where = torch.device(device)
    if not resume and not dry_run:
        shutil.rmtree(work, ignore_errors=True)
    base = anonymous()
    speeds = speeds or measure_speeds(opened.folder, options.cast or dtype_of(opened.model), where)
    limits = Limits(NO_LIMIT if memory_limit is None else memory_limit - base, _disk(work, disk_limit))
    context = _Context(opened, calls, options, identity, work, resume, where, limits, memory_limit, report)
    stages = [context.stage(n) for n in range(len(options.stages))]
    plans = [stage.plan(speeds) for stage in stages]
    lines = [line for plan in plans for line in schedule_lines(plan, limits, base, speeds)]
    for line in lines:
        tell(line)
    if dry_run:
        return BoundedResult(plans, lines)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / RUN, _Run(identity=identity))
    for stage, plan in zip(stages, plans, strict=True):
        stage.run(plan.schedule)
    opened.save()
    run = _Run(
        identity=identity,
        ended=True,
        stages=[stage.curves() for stage in stages],
        stopped={edit: why for stage in stages for edit, why in stage.stopped.items()},
    )
    losses = Losses(plan=identity.plan, calls=identity.calls, sequential=False, stages=run.stages)
    losses.save(opened.folder / LOSSES)
    write_json(work / RUN, run)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    seconds = time.perf_counter() - began
    return BoundedResult(plans, lines, tuple(run.stages), run.stopped, opened.folder / LOSSES, seconds)


def _check(options: BoundedOptions) -> None:
    for name in options.stages:
        if name == "finetune":
            raise PpclError(
                "stage finetune trains a whole mixture; leave it out, or train without a memory limit"
            )
        if name not in STAGES:
            raise PpclError(f"unknown stage {name!r}{near(name, STAGES)}: the stages are {', '.join(STAGES)}")
    if not options.stages or [name for name in STAGES if name in options.stages] != list(options.stages):
        raise PpclError(
            f"stages {','.join(options.stages)} are out of order or repeated: keep to depth,width"
        )
    if len(options.steps) != len(options.stages) or min(options.steps) < 1:
        raise PpclError(
            f"steps {options.steps}: give one number above 0 for each of {','.join(options.stages)}"
        )
    if options.weights.attention:
        raise PpclError("the distillation graph compares no attention outputs: leave their weight at 0")
    if options.weights.relative and options.batch > 1:
        raise PpclError(
            "the relative loss is a ratio over a whole batch, and here its calls come one by one: give batch 1"
        )


def _before(work: Path, identity: Identity, resume: bool) -> _Run | None:
    """Return the run that the work folder holds, where it is to be gone on with."""
    if not (work / RUN).is_file():
        return None
    run = read_json(work / RUN, _Run)
    if resume:
        run.identity.check(identity, work)
        return run
    if not run.ended:
        raise PpclError(f"{work}: holds a training that did not end; resume it, or remove that folder")
    return None


def _disk(work: Path, limit: int | None) -> int:
    """Bytes that may be used: what is free and what the run took before."""
    place = work.parent
    mine = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) if work.is_dir() else 0
    free = max(0, shutil.disk_usage(place).free + mine - ROOM)
    return free if limit is None else min(limit, free)


@dataclass(frozen=True)
class _Context:
    """What all stages of a run share."""

    opened: StudentFolder
    calls: Calls
    options: BoundedOptions
    identity: Identity
    work: Path
    resume: bool
    device: torch.device
    limits: Limits
    memory_limit: int | None
    report: Report

    def stage(self, number: int) -> _Stage:
        """Return a stage by its position in the run."""
        model = self.opened.model
        model.requires_grad_(
            False
        )  # these parameters are on the meta device: the flags tell what is to train
        model.students_module.requires_grad_(True)
        return _Stage(self, number, problems(model, self.options.stages[number]))

    def batches(self, batch: int) -> Batches:
        """Return the batches, tensors on the CPU."""
        return Batches(self.calls, batch, self.options.seed, dtype=dtype_of(self.opened.model))


class _Stage:
    """A stage: its problems, its schedule, its run."""

    def __init__(self, context: _Context, number: int, found: Sequence[Problem]) -> None:
        self._context, self._number, self._problems = context, number, found
        self._name, self._steps = context.options.stages[number], context.options.steps[number]
        self._finished: dict[int, StageCurves] = {}
        self._costs: list[ProblemCost] = []
        self._teacher: TeacherCost | None = None
        self.stopped: dict[str, str] = {}
        batches = context.batches(context.options.batch)
        sizes = [call_size(call) for call in context.calls]
        self._batch_sizes = [call.batch for call in context.calls]
        self._work = Work(
            [batches.indices(step) for step in range(self._steps)],
            [size / max(1, sizes[0]) for size in sizes],
        )
        for problem in found if context.resume else ():
            self._note(problem)

    def plan(self, speeds: Speeds) -> StageSchedule:
        """Make the schedule of what is not finished.

        Raises:
            PpclError: a limit is too small.
        """
        left = self._left()
        if not left:
            return StageSchedule(self._name, self._steps, (), None)
        context, gm = self._context, self._context.opened.model.graph
        route = Route(gm, left)
        segments = cut(gm, skip=route.skip)
        self._teacher = teacher_cost(gm, segments, route.skip, self._work.largest())
        checkpointing = context.options.checkpointing and self._name == "depth"
        self._costs = [problem_cost(problem, route.last(problem), checkpointing) for problem in left]
        saved = 0 if context.options.every >= self._steps else checkpoints.KEPT + 1
        schedule = plan_schedule(self._costs, self._teacher, self._work, context.limits, speeds, saved)
        return StageSchedule(self._name, self._steps, tuple(problem.edits for problem in left), schedule)

    def run(self, schedule: Schedule | None) -> None:
        """Train what is not finished, and lay the results over the saved students.

        Raises:
            PpclError: the disk is full, or a call cannot be used.
        """
        left = self._left()
        for number, sweep in enumerate(schedule.sweeps if schedule is not None else ()):
            self._sweep(sweep, [left[i] for i in sweep.problems], number, left)
        for problem in self._problems:
            found = load_finished(self._done, self._title(problem))
            if found is None:
                raise PpclError(
                    f"{self._done}: {problem.title} was damaged after it was trained; resume to mend it"
                )
            self._context.opened.trained.update(found[0])
        shutil.rmtree(self._context.work / "cache", ignore_errors=True)

    def curves(self) -> StageCurves:
        """Return the losses of all students, in the order of the graph."""
        mine = [self._finished[problem.number] for problem in self._problems]
        return StageCurves(
            name=self._name,
            label=self._name,
            steps=self._steps,
            seconds=sum(curves.seconds for curves in mine),
            losses={edit: values for curves in mine for edit, values in curves.losses.items()},
        )

    def _sweep(self, sweep: Sweep, mine: Sequence[Problem], number: int, left: Sequence[Problem]) -> None:
        assert self._teacher is not None
        context, opened = self._context, self._context.opened
        route = Route(opened.model.graph, mine)
        room = cache_room(self._costs, self._teacher, self._work, context.limits.memory, sweep)
        cache = Cache(
            context.work / "cache",
            route.key(self._name, context.identity.plan, context.identity.calls),
            room,
            context.limits.disk,
            context.device,
        )
        teacher = Teacher(
            route,
            context.batches(1),
            opened.read,
            opened.release,
            cache,
            context.work / "states",
            partial(states_room, context.memory_limit, self._teacher.block, cache, room),
            context.device,
            context.report,
        )
        for group in sweep.groups:
            self._group([left[i] for i in group], sweep.windows, teacher, cache)

    def _group(
        self, mine: Sequence[Problem], windows: Sequence[tuple[int, int]], teacher: Teacher, cache: Cache
    ) -> None:
        """Train the problems of a group side by side, step by step."""
        context = self._context
        if len(windows) == 1:
            # Before the students are in memory.
            teacher.fill(self._calls(*windows[0]))
        students = [self._student(problem) for problem in mine]
        try:
            for start, stop in windows:
                begin = max(start, min(student.done for student in students))
                if begin >= stop:
                    continue
                if len(windows) > 1:
                    cache.keep_only(self._calls(begin, stop))
                    teacher.fill(self._calls(begin, stop))
                for step in range(begin, stop):
                    self._step(step, students, teacher)
            for student in students:
                student.finish(self._done, self._title(student.problem))
                self._note(student.problem)
            context.opened.release()
        finally:
            for student in reversed(students):
                student.release()

    def _step(self, step: int, students: Sequence[Student], teacher: Teacher) -> None:
        options = self._context.options
        total = 0.0
        for student in students:
            if student.stopped or student.done != step:
                continue
            total += student.step(self._parts(step, student, teacher))
        every = (step + 1) % options.every == 0 and step + 1 < self._steps
        if every:
            for student in students:
                if student.done == step + 1:
                    student.checkpoint()
        titles = students[0].problem.title + (f" and {len(students) - 1} more" if len(students) > 1 else "")
        self._context.report(step + 1, self._steps, f"{self._name}, {titles}, loss {total:.4g}")

    def _parts(self, step: int, student: Student, teacher: Teacher) -> list[Part]:
        """Return the calls of a step with their shares of the batch: losses are means over samples."""
        calls = self._work.order[step]
        whole = sum(self._batch_sizes[call] for call in calls)
        return [
            (
                self._batch_sizes[call] / whole if len(calls) > 1 else 1.0,
                partial(teacher.border, student.problem, call),
            )
            for call in calls
        ]

    def _student(self, problem: Problem) -> Student:
        context = self._context
        folder = context.work / "checkpoints" / self._title(problem)
        return Student(
            problem,
            self._name,
            self._steps,
            context.opened.read,
            context.options,
            context.identity,
            folder,
            context.device,
        )

    def _calls(self, start: int, stop: int) -> list[int]:
        return sorted({call for step in self._work.order[start:stop] for call in step})

    def _left(self) -> list[Problem]:
        return [problem for problem in self._problems if problem.number not in self._finished]

    def _note(self, problem: Problem) -> None:
        """Take down what came of a problem, if it is finished."""
        found = load_finished(self._done, self._title(problem))
        if found is not None:
            self._finished[problem.number] = found[1].curves
            if found[1].stopped:
                self.stopped.update(dict.fromkeys(problem.edits, found[1].stopped))

    @property
    def _done(self) -> Path:
        return self._context.work / "done"

    def _title(self, problem: Problem) -> str:
        return f"{self._name}-{problem.number:03d}"
