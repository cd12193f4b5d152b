"""The loop: step after step, with checkpoints from which a killed run goes on to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.train import checkpoints, schedule
from ppcl_fx.train.checkpoints import Checkpoint, Identity
from ppcl_fx.train.curves import StageCurves
from ppcl_fx.train.data import Batches
from ppcl_fx.train.masters import Masters
from ppcl_fx.train.stages import Stage

Progress = Callable[[str, int, int, float], None]
"""Told after each step: the stage, the steps done, the stage's steps, and the sum of the losses."""


@dataclass
class Journal:
    """Where a run's checkpoints and curves go.

    Attributes:
        folder: The checkpoints' folder.
        identity: What the checkpoints belong to.
        students: The pluggable model's students, state-dict name -> tensor; they are in every checkpoint.
        every: Steps between checkpoints; a stage's end has one in any case.
        device: The device whose random generator is stored too.
        curves: One entry a stage, the current one last.
    """

    folder: Path
    identity: Identity
    students: Mapping[str, Tensor]
    every: int
    device: torch.device
    curves: list[StageCurves] = field(default_factory=list)

    def write(
        self, number: int, step: int, stage: Stage, masters: Masters, optimizer: torch.optim.Optimizer
    ) -> None:
        """Write a checkpoint of the current stage after `step` of its steps."""
        tensors = {f"students.{name}": value for name, value in self.students.items()}
        tensors |= stage.tensors() | masters.tensors()
        tensors |= checkpoints.optimizer_state(optimizer) | checkpoints.rng_state(self.device)
        checkpoints.save(self.folder, self.identity, number, step, self.curves, tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the students and the curves to what the checkpoint holds."""
        self.curves = [curves.model_copy(deep=True) for curves in checkpoint.state.curves]
        with torch.no_grad():
            for name, value in self.students.items():
                value.copy_(checkpoint.tensors[f"students.{name}"])


def run_stage(
    stage: Stage,
    batches: Batches,
    journal: Journal,
    *,
    number: int,
    total: int,
    lr: float,
    clip: float | None,
    start: Checkpoint | None = None,
    progress: Progress | None = None,
) -> None:
    """Train `stage`, whose curves are the last of `journal`, from its beginning or from `start`, for `total`
    steps.

    Args:
        number: The stage's position in the run, from 0.
        lr: The peak learning rate.
        clip: The largest L2 norm of each edit's gradients, or None.

    Raises:
        PpclError: A loss or gradient is NaN or infinite: the line names the stage, the step and the edit. No
            update of that step is done, so the last checkpoint is good.
    """
    curves = journal.curves[-1]
    masters = Masters(stage.groups)
    optimizer = schedule.optimizer(masters.groups, lr)
    done = 0
    if start is not None:
        stage.load(start.tensors)
        masters.load(start.tensors)
        checkpoints.load_optimizer_state(optimizer, start.tensors)
        checkpoints.set_rng_state(start.tensors, journal.device)
        done = start.state.step
    before, began = curves.seconds, time.perf_counter()
    for step in range(done, total):
        rate = lr * schedule.factor(step, total)
        losses = _step(stage, batches, masters, optimizer, step, rate, clip, curves)
        curves.append(losses)
        curves.seconds = before + time.perf_counter() - began
        if (step + 1) % journal.every == 0 or step + 1 == total:
            journal.write(number, step + 1, stage, masters, optimizer)
        if progress is not None:
            progress(curves.label, step + 1, total, sum(losses.values()))
    optimizer.zero_grad(set_to_none=True)


def _step(
    stage: Stage,
    batches: Batches,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    step: int,
    lr: float,
    clip: float | None,
    curves: StageCurves,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    found = stage.step(batches.kwargs(step))
    masters.take_gradients()
    norms = schedule.clip(masters.groups, clip)
    where = f"stage {curves.label}, step {step + 1}"
    losses = _numbers(found)
    _check("loss", losses, where)
    _check("gradient norm", _numbers(norms), where)
    optimizer.step()
    masters.write_back()
    stage.updated(step)
    return losses


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Fetch all scalars from the device at once."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def _check(what: str, values: Mapping[str, float], where: str) -> None:
    for edit, value in values.items():
        if not math.isfinite(value):
            raise PpclError(
                f"{where}: the {what} of {edit} is {value}; the last checkpoint is good, "
                "train again with a smaller learning rate"
            )
