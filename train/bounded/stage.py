"""One stage of a memory-bounded training: its problems, its schedule, its run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import ROOM
from ppcl_fx.io.memory import anonymous
from ppcl_fx.ir.executor import Residency
from ppcl_fx.ir.partition import cut
from ppcl_fx.ir.spill import Spill
from ppcl_fx.model.student_folder import StudentFolder, load_finished, save_finished
from ppcl_fx.passes.calibration.initialise import fit_on_disk, projector_sites
from ppcl_fx.passes.calibration.memory_estimate import block_bytes, elements
from ppcl_fx.schema.curves import StageCurves
from ppcl_fx.train.bounded.cache import Cache
from ppcl_fx.train.bounded.costs import Speeds, problem_cost, teacher_cost
from ppcl_fx.train.bounded.problems import Problem, Student, problems
from ppcl_fx.train.bounded.schedule import Capacity, PricedWork, Pricing, Schedule, StageSchedule, Sweep
from ppcl_fx.train.bounded.teacher import Report, Route, Teacher, prepared, states_room
from ppcl_fx.train.config import NO_LIMIT, Limits, TrainConfig
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.batches import Batches, call_names, split
from ppcl_fx.train.core.checkpoints import CheckpointWriter, RunIdentity
from ppcl_fx.train.core.distillation_graph import train_only
from ppcl_fx.train.core.stage_trainer import BatchPart, StageTrainer

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls

WORK = "bounded"
"""The folder, in the student's, of what a run keeps until it ends."""
FITTED = "projectors"
"""What the projectors in students that were fitted again are called in the work folder."""


@dataclass
class StageContext:
    """What all stages of a run share."""

    opened: StudentFolder
    calls: Calls
    options: TrainConfig
    limits: Limits
    identity: RunIdentity
    resume: bool
    device: torch.device
    report: Report = lambda done, total, label: None

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.opened.folder / WORK

    @cached_property
    def drawn(self) -> tuple[list[int], list[int]]:
        """Positions of the calls to train and to evaluate on."""
        return split(self.calls, self.options.held_out, self.options.seed)

    @cached_property
    def base(self) -> int:
        """Bytes that the process held before."""
        return anonymous()

    @cached_property
    def capacity(self) -> Capacity:
        """What may be used; of the disk what is free, and what the run took before."""
        memory, disk, cache_memory = self.limits.memory, self.limits.disk, self.limits.cache_memory
        mine = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        free = max(0, shutil.disk_usage(self.opened.folder).free + mine - ROOM)
        return Capacity(
            memory=NO_LIMIT if memory is None else memory - self.base,
            disk=free if disk is None else min(disk, free),
            cache_memory=NO_LIMIT if cache_memory is None else cache_memory,
        )

    def stage(self, number: int) -> BoundedStage:
        """Return a stage by its position in the run."""
        model = self.opened.model
        # These parameters are on the meta device: the flags only tell what is to train.
        train_only(model, self.options.stages[number])
        return BoundedStage(self, number, problems(model, self.options.stages[number]))

    def fit_again(self) -> None:
        """Fit the projectors in students to what "depth" made of these, as the ordinary training does. Raises
        PpclError where the disk is full, or a call cannot be used.
        """
        opened, done, gm = self.opened, self.work / "done", self.opened.model.graph
        if not any(site.in_student for site in projector_sites(gm)):
            return
        found = load_finished(done, FITTED) if self.resume else None
        if found is None:
            work, used = self.work / FITTED, self.drawn[0]
            scale = max(elements(self.calls[i].kwargs) for i in used) / max(1, opened.traced_size)
            values = Spill(work, states_room(self.limits.memory, block_bytes(gm, scale)), self.device)
            fitted = fit_on_disk(
                gm,
                prepared(gm, self.batches(1), used),
                len(used),
                Residency(self.device, opened.read, values, opened.release),
                work,
                lambda done, total, label="": self.report(done, total, label),
                in_students=True,
            )
            fitted = {name: tensor.to(opened.model.dtype) for name, tensor in fitted.items()}
            save_finished(done, FITTED, fitted, StageCurves(name="depth", label="depth"))
            shutil.rmtree(work, ignore_errors=True)
        self.lay_over(FITTED, FITTED)

    def lay_over(self, title: str, words: str) -> None:
        """Lay what was finished under a title over the saved students. Raises PpclError where it is damaged."""
        found = load_finished(self.work / "done", title)
        if found is None:
            raise PpclError(f"{self.work / 'done'}: {words} was damaged after it was written; resume to mend it")
        self.opened.trained.update(found[0])

    def batches(self, batch: int, only: Sequence[int] | None = None) -> Batches:
        """Return the batches of some calls, or of all; tensors on the CPU."""
        return Batches(self.calls, batch, self.options.seed, dtype=self.opened.model.dtype, only=only)


class BoundedStage:
    """A stage: its problems, its schedule, its run."""

    def __init__(self, context: StageContext, number: int, found: Sequence[Problem]) -> None:
        self._context, self._problems = context, found
        self._name, self._steps = context.options.stages[number], context.options.steps[number]
        self._finished: dict[int, StageCurves] = {}
        self._pricing: Pricing | None = None
        options, (used, held) = context.options, context.drawn
        batches, count = context.batches(options.batch, used), options.accumulate
        self._batches = [batches.indices(position) for position in range(self._steps * count)]
        held_out = context.batches(options.batch, held) if held else None
        self._held_out = [held_out.indices(step) for step in range(len(held_out))] if held_out is not None else []
        self._sizes = [call.batch for call in context.calls]
        traced = max(1, context.opened.traced_size)
        self._work = PricedWork(
            [tuple(chain(*self._batches[i : i + count])) for i in range(0, len(self._batches), count)],
            [elements(call.kwargs) / traced for call in context.calls],
            held,
            options.evaluate_every,
        )
        for problem in found if context.resume else ():
            self._note(problem)

    def plan(self, speeds: Speeds) -> StageSchedule:
        """Make the schedule of what is not finished. Raises PpclError where a limit is too small."""
        left = self._left()
        if not left:
            return StageSchedule(self._name, self._steps, (), None)
        context, gm = self._context, self._context.opened.model.graph
        options, route = context.options, Route(gm, left)
        teacher = teacher_cost(gm, cut(gm, skip=route.skip), route.skip, self._work.largest())
        kept = options.checkpointing and self._name == "depth", options.optimizer, options.ema is not None
        costs = tuple(problem_cost(problem, route.last(problem), *kept) for problem in left)
        self._pricing = Pricing(costs, teacher, self._work, context.capacity, speeds)
        saved = 0 if options.every >= self._steps else checkpoints.KEPT + 1
        students = tuple(problem.edit for problem in left)
        return StageSchedule(self._name, self._steps, students, self._pricing.plan(saved), costs, teacher)

    def run(self, schedule: Schedule | None) -> None:
        """Train what is not finished, and lay the results over the saved students. Raises PpclError where the disk is
        full, or a call cannot be used.
        """
        left = self._left()
        for sweep in schedule.sweeps if schedule is not None else ():
            self._sweep(sweep, left)
        for problem in self._problems:
            self._context.lay_over(self._title(problem), problem.edit)
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

    def _sweep(self, sweep: Sweep, left: Sequence[Problem]) -> None:
        assert self._pricing is not None
        context, opened, mine = self._context, self._context.opened, [left[i] for i in sweep.problems]
        route, block = Route(opened.model.graph, mine), self._pricing.teacher.block
        room = self._pricing.cache_room(sweep)
        cache = Cache(
            context.work / "cache",
            route.key(self._name, context.identity.plan, context.identity.calls),
            room,
            context.capacity.disk,
            context.device,
        )
        values = Spill(context.work / "states", 0, context.device)
        teacher = Teacher(
            route,
            context.batches(1),
            Residency(context.device, opened.read, values, opened.release),
            cache,
            lambda: states_room(context.limits.memory, block, max(0, room - cache.held_bytes)),
            context.report,
        )
        for group in sweep.groups:
            if len(sweep.windows) == 1:
                # Before the students are in memory, and for those of the groups to come too.
                teacher.fill(self._left(mine), self._work.calls(*sweep.windows[0]))
            self._group([left[i] for i in group], sweep.windows, teacher, cache)

    def _group(
        self, mine: Sequence[Problem], windows: Sequence[tuple[int, int]], teacher: Teacher, cache: Cache
    ) -> None:
        """Train the problems of a group side by side, step by step, until all steps are done or all have stopped."""
        context = self._context
        running = [self._trainer(problem, teacher) for problem in mine]
        titles = mine[0].edit + (f" and {len(mine) - 1} more" if len(mine) > 1 else "")
        for start, stop in windows:
            begin = max(start, min((trainer.done for _, trainer in running), default=self._steps))
            if begin >= stop:
                continue
            if len(windows) > 1:
                calls = self._work.calls(begin, stop)
                cache.keep_only(calls)
                teacher.fill(self._left(mine), calls)
            for step in range(begin, stop):
                if not running:
                    break
                loss = sum([self._step(*pair) for pair in running if pair[1].done == step])
                running = [pair for pair in running if not pair[1].over]
                context.report(step + 1, self._steps, f"{self._name}, {titles}, loss {loss:.4g}")
        context.opened.release()

    def _step(self, student: Student, trainer: StageTrainer) -> float:
        """Do a step of a student; return its loss. After its last one write what came out."""
        found = trainer.step()
        trainer.evaluate()
        if not trainer.over:
            trainer.checkpoint()
        if trainer.over:
            trainer.settle()
            tensors = {name: p.detach() for name, p in student.tensors_by_name.items()}
            save_finished(self._done, self._title(student.problem), tensors, trainer.curves)
            shutil.rmtree(trainer.writer.folder, ignore_errors=True)
            self._note(student.problem)
        return sum(found.losses.values()) if found is not None else 0.0

    def _trainer(self, problem: Problem, teacher: Teacher) -> tuple[Student, StageTrainer]:
        """Return a student and what trains it, from its beginning or from its last checkpoint."""
        context, options = self._context, self._context.options
        student = Student(problem, context.opened.read, options, self._name == "depth", context.device)
        folder = context.work / "checkpoints" / self._title(problem)
        curves = [StageCurves(name=self._name, label=self._name)]
        writer = CheckpointWriter(
            folder, context.identity, student.tensors_by_name, None, curves, beginning=context.opened.read
        )
        last = checkpoints.latest(folder, context.identity)
        if last is not None:
            writer.restore(last)
        borders = Borders(problem, teacher, self._batches, self._sizes, context.calls)
        held = Borders(problem, teacher, self._held_out, self._sizes, context.calls)
        held_out = [partial(held.parts, number) for number in range(len(self._held_out))]
        trainer = StageTrainer(student, borders, writer, options, self._steps, held_out)
        if last is not None:
            trainer.restore(last)
        return student, trainer

    def _left(self, among: Sequence[Problem] | None = None) -> list[Problem]:
        """Return the problems that are not finished, of some or of all."""
        mine = self._problems if among is None else among
        return [problem for problem in mine if problem.number not in self._finished]

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


class Borders:
    """The teacher's values at a student's border, call by call: a `ppcl_fx.train.core.stage_trainer.Draw`.

    `batches` has the positions of each batch's calls, `sizes` the samples of each call.
    """

    def __init__(
        self, problem: Problem, teacher: Teacher, batches: Sequence[tuple[int, ...]], sizes: Sequence[int], calls: Calls
    ) -> None:
        self._problem, self._teacher, self._batches = problem, teacher, batches
        self._sizes, self._calls = sizes, calls

    def parts(self, position: int) -> Iterator[BatchPart]:
        """Yield the calls of a batch with their shares of it: losses are means over samples."""
        calls, whole = self._batches[position], self.samples(position)
        for call in calls:
            share = self._sizes[call] / whole if len(calls) > 1 else 1.0
            yield share, partial(self._border, call)

    def samples(self, position: int) -> int:
        """Return the number of samples of a batch."""
        return sum(self._sizes[call] for call in self._batches[position])

    def names(self, position: int) -> str:
        """Return a batch for a message: ``call 3``, ``calls 3, 7``."""
        return call_names([self._calls[call] for call in self._batches[position]])

    def _border(self, call: int) -> tuple[list[Any], None]:
        return self._teacher.border(self._problem, call), None
