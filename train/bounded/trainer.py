"""Distillation of a saved pluggable model within a memory limit: what the command line calls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch.fx import GraphModule

from ppcl_fx import owned
from ppcl_fx.errors import GuardError, PpclError, near
from ppcl_fx.files import ROOM, inside, read_json, write_json
from ppcl_fx.memory import anonymous
from ppcl_fx.tracing import bind, with_rows
from ppcl_fx.train.bounded.folder import StudentFolder
from ppcl_fx.train.bounded.options import STAGES, BoundedOptions, BoundedResult
from ppcl_fx.train.bounded.schedule import Limits, Speeds
from ppcl_fx.train.bounded.speeds import measure_speeds
from ppcl_fx.train.bounded.stage import Context
from ppcl_fx.train.bounded.teacher import Report
from ppcl_fx.train.bounded.words import schedule_lines
from ppcl_fx.train.checkpoints import Identity
from ppcl_fx.train.curves import LOSSES, Losses, StageCurves
from ppcl_fx.train.data import split
from ppcl_fx.train.finetuned import plan_digest
from ppcl_fx.train.places import check_places
from ppcl_fx.train.schedule import try_eight_bit

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

    def stopped(self) -> dict[str, str]:
        """Return edit id -> why it ended before its last step; the last stage's word counts."""
        return {edit: stop.reason for stage in self.stages for edit, stop in stage.stopped.items()}


def train_bounded(
    folder: str | Path,
    calls: Calls,
    options: BoundedOptions,
    *,
    memory_limit: int | None,
    disk_limit: int | None = None,
    cache_memory: int | None = None,
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
        cache_memory: bytes of the memory that the cache may take at most; what the students leave when None.
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
    where = torch.device(device)
    _check(options, where)
    opened = StudentFolder.open(folder, teacher)
    if calls.model and opened.model.plan.model and calls.model != opened.model.plan.model:
        raise PpclError(f"{folder}: the calls were recorded from another model; record calls of its teacher")
    _check_kinds(opened.model.graph, calls)
    identity = Identity(
        plan=plan_digest(opened.model.plan), calls=calls.fingerprint, options=options.decisive()
    )
    work = opened.folder / WORK
    owned.check_no_link(work)
    owned.check_replaceable(work, owned.BOUNDED)
    check_places(opened.folder, None, None)
    before = _before(work, identity, resume)
    if before is not None and before.ended and not dry_run:
        losses = opened.folder / LOSSES
        return BoundedResult((), (), tuple(before.stages), before.stopped(), losses, 0.0)
    used, held = split(calls, options.held_out, options.seed)
    if not resume and not dry_run:
        owned.discard(work, owned.BOUNDED)
    base = anonymous()
    speeds = speeds or measure_speeds(opened.folder, options.cast or opened.model.dtype, where)
    limits = Limits(
        memory=NO_LIMIT if memory_limit is None else memory_limit - base,
        disk=_disk(work, disk_limit),
        cache_memory=NO_LIMIT if cache_memory is None else cache_memory,
    )
    context = Context(opened, calls, options, identity, work, resume, where, limits, memory_limit, report, used, held)
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
        if plan.stage == "depth":
            context.fit_again()
    opened.save()
    run = _Run(
        identity=identity,
        ended=True,
        stages=[stage.curves() for stage in stages],
    )
    curves = Losses(plan=identity.plan, calls=identity.calls, sequential=False, stages=run.stages)
    curves.save(opened.folder / LOSSES)
    write_json(work / RUN, run)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    seconds = time.perf_counter() - began
    return BoundedResult(plans, lines, tuple(run.stages), run.stopped(), opened.folder / LOSSES, seconds)


def _check(options: BoundedOptions, device: torch.device) -> None:
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
    if options.patience is not None and not options.held_out:
        raise PpclError("training option patience: needs held-out calls to see a gain; give held_out a share")
    if options.optimizer == "adamw8bit":
        try_eight_bit(device)


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


def _before(work: Path, identity: Identity, resume: bool) -> _Run | None:
    """Return the run that the work folder holds, where it is to be gone on with."""
    if not (work / RUN).is_file():
        return None
    run = read_json(inside(work, RUN), _Run)
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
