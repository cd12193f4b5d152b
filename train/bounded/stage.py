"""One stage of a memory-bounded training: its problems, its schedule, its run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.distil import train_only
from ppcl_fx.passes.initialise import fit_on_disk, projector_sites
from ppcl_fx.passes.streaming.executor import Residency
from ppcl_fx.passes.streaming.footprint import block_bytes, elements
from ppcl_fx.passes.streaming.partition import cut
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.train import checkpoints
from ppcl_fx.train.bounded.cache import Cache
from ppcl_fx.train.bounded.costs import ProblemCost, Speeds, TeacherCost, problem_cost, teacher_cost
from ppcl_fx.train.bounded.folder import StudentFolder, load_finished, save_finished
from ppcl_fx.train.bounded.problems import Problem, problems
from ppcl_fx.train.bounded.schedule import (
    Capacity,
    Schedule,
    StageSchedule,
    Sweep,
    Work,
    cache_room,
    plan_schedule,
)
from ppcl_fx.train.bounded.student import Part, Student
from ppcl_fx.train.bounded.teacher import Report, Route, Teacher, prepared, states_room
from ppcl_fx.train.checkpoints import Identity
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.curves import StageCurves
from ppcl_fx.train.data import Batches

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls

FITTED = "projectors"
"""What the projectors in students that were fitted again are called in the work folder."""


@dataclass
class Context:
    """What all stages of a run share; `used` and `held` are the positions of the calls to train and to evaluate on."""

    opened: StudentFolder
    calls: Calls
    options: TrainConfig
    identity: Identity
    work: Path
    resume: bool
    device: torch.device
    capacity: Capacity
    memory_limit: int | None
    report: Report
    used: Sequence[int]
    held: Sequence[int]

    def stage(self, number: int) -> Stage:
        """Return a stage by its position in the run."""
        model = self.opened.model
        # These parameters are on the meta device: the flags only tell what is to train.
        train_only(model, self.options.stages[number])
        return Stage(self, number, problems(model, self.options.stages[number]))

    def fit_again(self) -> None:
        """Fit the projectors in students to what "depth" made of these, as the ordinary training does.

        Raises:
            PpclError: the disk is full, or a call cannot be used.
        """
        opened, done = self.opened, self.work / "done"
        if not any(site.in_student for site in projector_sites(opened.model.graph)):
            return
        found = load_finished(done, FITTED) if self.resume else None
        if found is None:
            gm, work = opened.model.graph, self.work / FITTED
            scale = max(elements(self.calls[i].kwargs) for i in self.used) / max(1, opened.traced_size)
            values = States(work, states_room(self.memory_limit, block_bytes(gm, scale)), self.device)
            fitted = fit_on_disk(
                gm,
                prepared(gm, self.batches(1), self.used),
                len(self.used),
                Residency(self.device, opened.read, values, opened.release),
                work,
                lambda done, total, label="": self.report(done, total, label),
                in_students=True,
            )
            dtype = opened.model.dtype
            fitted = {name: tensor.to(dtype) for name, tensor in fitted.items()}
            save_finished(done, FITTED, fitted, StageCurves(name="depth", label="depth"))
            shutil.rmtree(work, ignore_errors=True)
            found = load_finished(done, FITTED)
        if found is None:
            raise PpclError(f"{done}: {FITTED} was damaged after it was written; resume to mend it")
        opened.trained.update(found[0])

    def batches(self, batch: int, only: Sequence[int] | None = None) -> Batches:
        """Return the batches of some calls, or of all; tensors on the CPU."""
        return Batches(self.calls, batch, self.options.seed, dtype=self.opened.model.dtype, only=only)


class Stage:
    """A stage: its problems, its schedule, its run."""

    def __init__(self, context: Context, number: int, found: Sequence[Problem]) -> None:
        self._context, self._number, self._problems = context, number, found
        self._name, self._steps = context.options.stages[number], context.options.steps[number]
        self._finished: dict[int, StageCurves] = {}
        self._costs: list[ProblemCost] = []
        self._teacher: TeacherCost | None = None
        options = context.options
        batches, count = context.batches(options.batch, context.used), options.accumulate
        self._rounds = [
            [batches.indices(position) for position in range(step * count, (step + 1) * count)]
            for step in range(self._steps)
        ]
        self._held_out: list[tuple[int, ...]] = []
        if context.held:
            held_out = context.batches(options.batch, context.held)
            self._held_out = [held_out.indices(step) for step in range(len(held_out))]
        self._batch_sizes = [call.batch for call in context.calls]
        traced = max(1, context.opened.traced_size)
        self._work = Work(
            [tuple(call for batch in rounds for call in batch) for rounds in self._rounds],
            [elements(call.kwargs) / traced for call in context.calls],
            context.held,
            options.evaluate_every,
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
        kept = (context.options.optimizer, context.options.ema is not None)
        self._costs = [problem_cost(problem, route.last(problem), checkpointing, *kept) for problem in left]
        saved = 0 if context.options.every >= self._steps else checkpoints.KEPT + 1
        schedule = plan_schedule(self._costs, self._teacher, self._work, context.capacity, speeds, saved)
        students = tuple(problem.edit for problem in left)
        return StageSchedule(self._name, self._steps, students, schedule, tuple(self._costs), self._teacher)

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
                    f"{self._done}: {problem.edit} was damaged after it was trained; resume to mend it"
                )
            self._context.opened.trained.update(found[0])
        shutil.rmtree(self._context.work / "cache", ignore_errors=True)

    def curves(self) -> StageCurves:
        """Return the curves of all students, in the order of the graph."""
        mine = [self._finished[problem.number] for problem in self._problems]
        return StageCurves(
            name=self._name,
            label=self._name,
            steps=max(curves.steps for curves in mine),
            seconds=sum(curves.seconds for curves in mine),
            losses={edit: values for curves in mine for edit, values in curves.losses.items()},
            held_out={edit: values for curves in mine for edit, values in curves.held_out.items()},
            stopped={edit: stop for curves in mine for edit, stop in curves.stopped.items()},
        )

    def _sweep(self, sweep: Sweep, mine: Sequence[Problem], number: int, left: Sequence[Problem]) -> None:
        assert self._teacher is not None
        context, opened = self._context, self._context.opened
        route, block = Route(opened.model.graph, mine), self._teacher.block
        room = cache_room(self._costs, self._teacher, self._work, context.capacity, sweep)
        cache = Cache(
            context.work / "cache",
            route.key(self._name, context.identity.plan, context.identity.calls),
            room,
            context.capacity.disk,
            context.device,
        )
        teacher = Teacher(
            route,
            context.batches(1),
            opened.read,
            opened.release,
            cache,
            context.work / "states",
            lambda: states_room(context.memory_limit, block, max(0, room - cache.held_bytes)),
            context.device,
            context.report,
        )
        for group in sweep.groups:
            if len(sweep.windows) == 1:
                # Before the students are in memory, and for those of the groups to come too.
                self._fill(mine, *sweep.windows[0], teacher)
            self._group([left[i] for i in group], sweep.windows, teacher, cache)

    def _fill(self, mine: Sequence[Problem], start: int, stop: int, teacher: Teacher) -> None:
        """Let the teacher run for the problems that are not finished, on the calls of a part of the steps."""
        teacher.narrow([problem for problem in mine if problem.number not in self._finished])
        teacher.fill(self._work.calls(start, stop))

    def _group(
        self, mine: Sequence[Problem], windows: Sequence[tuple[int, int]], teacher: Teacher, cache: Cache
    ) -> None:
        """Train the problems of a group side by side, step by step, until all steps are done or all have stopped."""
        context = self._context
        students = [self._student(problem) for problem in mine]
        try:
            for start, stop in windows:
                begin = max(start, min((s.done for s in students if not s.over), default=self._steps))
                if begin >= stop:
                    continue
                if len(windows) > 1:
                    cache.keep_only(self._work.calls(begin, stop))
                    self._fill(mine, begin, stop, teacher)
                for step in range(begin, stop):
                    if all(student.over for student in students):
                        break
                    self._step(step, students, teacher)
            context.opened.release()
        finally:
            for student in reversed(students):
                student.release()

    def _step(self, step: int, students: Sequence[Student], teacher: Teacher) -> None:
        options = self._context.options
        total = 0.0
        for student in students:
            if student.over or student.done != step:
                continue
            total += student.step([self._parts(batch, student, teacher) for batch in self._rounds[step]])
            if not student.over or student.done == self._steps:
                self._evaluate(student, teacher)
            if (step + 1) % options.every == 0:
                student.checkpoint()
            if student.over:
                student.finish(self._done, self._title(student.problem))
                self._note(student.problem)
        titles = students[0].problem.edit + (f" and {len(students) - 1} more" if len(students) > 1 else "")
        self._context.report(step + 1, self._steps, f"{self._name}, {titles}, loss {total:.4g}")

    def _evaluate(self, student: Student, teacher: Teacher) -> None:
        if self._work.evaluated(student.done):
            student.evaluate([self._parts(batch, student, teacher) for batch in self._held_out])

    def _parts(self, calls: Sequence[int], student: Student, teacher: Teacher) -> list[Part]:
        """Return the calls of a batch with their shares of it: losses are means over samples."""
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

    def _left(self) -> list[Problem]:
        return [problem for problem in self._problems if problem.number not in self._finished]

    def _note(self, problem: Problem) -> None:
        """Take down what came of a problem, if it is finished."""
        found = load_finished(self._done, self._title(problem))
        if found is not None:
            self._finished[problem.number] = found[1].curves

    @property
    def _done(self) -> Path:
        return self._context.work / "done"

    def _title(self, problem: Problem) -> str:
        return f"{self._name}-{problem.number:03d}"
