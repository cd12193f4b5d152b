"""The loop: step after step, with checkpoints from which a killed run goes on to the bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError, Stopped
from ppcl_fx.train import checkpoints, schedule
from ppcl_fx.train.average import Average
from ppcl_fx.train.checkpoints import Checkpoint, Identity
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.curves import StageCurves, Stop
from ppcl_fx.train.data import Batches
from ppcl_fx.train.evaluation import converged, evaluate
from ppcl_fx.train.masters import Masters
from ppcl_fx.train.signals import Asked
from ppcl_fx.train.sources.source import Feed
from ppcl_fx.train.stages import Stage
from ppcl_fx.train.watch import Watch

Progress = Callable[[str, int, int, float], None]
"""Told after each step: the stage, the steps done, the stage's steps, and the sum of the losses."""
_log = logging.getLogger("ppcl_fx.train")


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
        save: Writes a checkpoint, as `checkpoints.save` does.
    """

    folder: Path
    identity: Identity
    students: Mapping[str, Tensor]
    every: int
    device: torch.device
    curves: list[StageCurves] = field(default_factory=list)
    save: Callable[..., object] = checkpoints.save

    def write(self, number: int, step: int, tensors: Mapping[str, Tensor], *, over: bool = False) -> None:
        """Write a checkpoint of the current stage after `step` of its steps: the students and `tensors`."""
        students = {f"students.{name}": value for name, value in self.students.items()}
        states = checkpoints.rng_state(self.device)
        everything = {**students, **tensors, **states}
        self.save(self.folder, self.identity, number, step, self.curves, everything, over=over)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Set the students and the curves to what the checkpoint holds."""
        self.curves = [curves.model_copy(deep=True) for curves in checkpoint.state.curves]
        with torch.no_grad():
            for name, value in self.students.items():
                value.copy_(checkpoint.tensors[f"students.{name}"])

    def go_back(self, parameters: list[Parameter]) -> bool:
        """Set some of the students' parameters to the newest checkpoint's values; tell whether there is one."""
        last = checkpoints.latest(self.folder, self.identity)
        wanted = {id(parameter) for parameter in parameters}
        if last is None:
            return False
        with torch.no_grad():
            for name, value in self.students.items():
                if id(value) in wanted:
                    value.copy_(last.tensors[f"students.{name}"])
        return True


@dataclass(frozen=True)
class Around:
    """What a stage runs with, beside its own work.

    Attributes:
        held_out: Batches of calls that are never trained on, or None.
        recorded: Use the recorded outputs of the teacher as targets.
        score: Called at each evaluation; what it returns is logged.
        watch: Follows the run.
        asked: Whether a signal wants the run to stop.
        progress: Told after each step.
    """

    held_out: Batches | None = None
    recorded: bool = False
    score: Callable[[], float] | None = None
    watch: Watch = field(default_factory=Watch)
    asked: Asked = field(default_factory=Asked)
    progress: Progress | None = None


def run_stage(
    stage: Stage,
    feed: Feed,
    journal: Journal,
    options: TrainConfig,
    *,
    number: int,
    total: int,
    lr: float,
    start: Checkpoint | None = None,
    around: Around | None = None,
) -> None:
    """Train `stage`, whose curves are the last of `journal`, from its beginning or from `start`, for `total`
    steps or until every student has stopped.

    Args:
        number: The stage's position in the run, from 0.
        lr: The peak learning rate.

    Raises:
        PpclError: Every loss is NaN or infinite, or, where the edits are not separate, one is: the line names the
            stage, the step, the edit and the calls. No update of that step is done, so the last checkpoint is good.
        Stopped: A signal asked to stop; a checkpoint was written.
    """
    _Run(stage, feed, journal, options, number, total, lr, around or Around()).go(start)


class _Run:
    """One stage on its way."""

    def __init__(
        self,
        stage: Stage,
        feed: Feed,
        journal: Journal,
        options: TrainConfig,
        number: int,
        total: int,
        lr: float,
        around: Around,
    ) -> None:
        self._stage, self._feed, self._journal, self._options = stage, feed, journal, options
        self._number, self._total, self._lr, self._around = number, total, lr, around
        self._curves = journal.curves[-1]
        self._parameters = {edit: list(parameters) for edit, parameters in stage.groups.items()}
        self._masters = Masters(stage.groups)
        self._average = Average(self._masters, options.ema)
        self._optimizer = schedule.optimizer(
            self._masters.groups,
            lr,
            kind=options.optimizer,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )

    def go(self, start: Checkpoint | None) -> None:
        """Run the steps that are left, and make the averages the weights."""
        done = self._restore(start) if start is not None else 0
        watch, asked, curves = self._around.watch, self._around.asked, self._curves
        watch.begin(curves.label, done, self._total)
        before, began = curves.seconds, watch.clock()
        step = done
        while step < self._total and self._stage.groups:
            rate = self._lr * schedule.factor(step, self._total, self._options.warmup)
            halted = set(curves.stopped)
            found = self._step(step, rate)
            if found is None:
                self._leave(step, saved=step == done and start is not None)
            losses, norms, seconds = found
            step += 1
            curves.append(losses)
            held_out, score = self._evaluate(step)
            curves.seconds = before + watch.clock() - began
            stopped = {e: stop.reason for e, stop in curves.stopped.items() if e not in halted}
            watch.row(
                step, seconds, losses=losses, lr=rate, norms=norms, held_out=held_out, score=score, stopped=stopped
            )
            if stopped:
                watch.changed()
            over = step == self._total or not self._stage.groups
            due = over or step % self._journal.every == 0
            if due:
                self._look_at_weights(step)
            saved = due and self._save(step, over)
            if self._around.progress is not None:
                self._around.progress(curves.label, step, self._total, sum(losses.values()))
            if asked:
                self._leave(step, saved)
        for edit in list(self._stage.groups):
            self._average.settle(edit)
        self._optimizer.zero_grad(set_to_none=True)

    def _restore(self, start: Checkpoint) -> int:
        self._stage.load(start.tensors)
        self._masters.load(start.tensors)
        self._average.load(start.tensors)
        checkpoints.load_optimizer_state(self._optimizer, start.tensors)
        checkpoints.set_rng_state(start.tensors, self._journal.device)
        for edit in self._curves.stopped:
            self._average.forget(edit)
            self._stage.stop(edit)
        return start.state.step

    def _step(self, step: int, rate: float) -> tuple[dict[str, float], dict[str, float], float] | None:
        """Do one step; return losses, gradient norms and seconds, or None where a signal came first."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        count, samples = self._options.accumulate, 0
        positions = range(step * count, (step + 1) * count)
        found: list[dict[str, Tensor]] = []
        with self._around.watch.step():
            for position in positions:
                if self._around.asked:
                    return None
                kwargs = self._feed.kwargs(position)
                target = self._feed.target(position) if self._around.recorded else None
                found.append(self._stage.step(kwargs, target=target, scale=1.0 / count))
                self._masters.take_gradients()
                samples += self._feed.samples(position)
        active = {edit: self._masters.groups[edit] for edit in self._stage.groups}
        norms = self._stage.norms(schedule.clip(active, self._options.clip))
        numbers = [_numbers(losses) for losses in found]
        lengths = _numbers(norms)
        bad = self._spoilt(step, positions, numbers, lengths)
        for edit, reason in bad.items():
            self._give_up(edit, step, reason)
        self._optimizer.step()
        self._masters.write_back()
        self._average.update(step)
        losses = {e: sum(n[e] for n in numbers) / count for e in numbers[0] if e not in bad}
        seconds = self._around.watch.stepped(samples)
        return losses, {e: n for e, n in lengths.items() if e not in bad}, seconds

    def _spoilt(
        self, step: int, positions: range, losses: list[dict[str, float]], norms: dict[str, float]
    ) -> dict[str, str]:
        """Return edit id -> what is wrong, for each edit whose loss or gradient is not finite.

        Raises:
            PpclError: None is good, or they are not separate.
        """
        names = [self._feed.names(position) for position in positions]
        bad: dict[str, str] = {}
        for calls, values in zip(names, losses, strict=True):
            for edit, value in values.items():
                if not math.isfinite(value):
                    bad.setdefault(edit, f"the loss of {edit} is {value} ({calls})")
        for edit, value in norms.items():
            if not math.isfinite(value):
                bad.setdefault(edit, f"the gradient norm of {edit} is {value} ({'; '.join(names)})")
        if bad and (not self._stage.separate or len(bad) == len(norms)):
            raise PpclError(
                f"stage {self._curves.label}, step {step + 1}: {next(iter(bad.values()))}; the last checkpoint "
                "is good, train again with a smaller learning rate"
            )
        return bad

    def _give_up(self, edit: str, step: int, reason: str) -> None:
        """Stop an edit whose loss is NaN, with the weights of its last good update."""
        if all(bool(torch.isfinite(p).all()) for p in self._masters.groups[edit]):
            self._average.settle(edit)
            kept = "its last good weights are kept"
        else:
            # Gradients were finite in every update, so this is an overflow of the update itself.
            self._average.forget(edit)
            if not self._journal.go_back(self._parameters[edit]):
                raise PpclError(f"stage {self._curves.label}, step {step + 1}: {reason}; train again with a smaller lr")
            self._masters.read_back(self._parameters[edit])
            kept = "the last checkpoint's weights are kept"
        self._halt(edit, Stop(step=step, kind="nan", reason=f"step {step + 1}: {reason}; {kept}"))

    def _look_at_weights(self, step: int) -> None:
        """Before they are saved: give up an edit whose last update overflowed, which no loss has shown yet."""
        for edit in list(self._stage.groups):
            if all(bool(torch.isfinite(p).all()) for p in self._masters.groups[edit]):
                continue
            reason = f"the update left weights of {edit} that are not finite"
            if not self._stage.separate:
                raise PpclError(
                    f"stage {self._curves.label}, step {step}: {reason}; the last checkpoint is good, train again "
                    "with a smaller learning rate"
                )
            self._give_up(edit, step - 1, reason)

    def _halt(self, edit: str, stop: Stop) -> None:
        """Train an edit no further, and keep nothing for it that only training needs."""
        self._curves.stopped[edit] = stop
        for parameter in self._masters.groups[edit]:
            parameter.grad = None
            self._optimizer.state.pop(parameter, None)
        self._stage.stop(edit)
        level = logging.WARNING if stop.kind == "nan" else logging.INFO
        _log.log(level, "stage %s: %s stopped, %s", self._curves.label, edit, stop.reason)

    def _evaluate(self, step: int) -> tuple[dict[str, float], float | None]:
        """Return the held-out losses and the score after `step`, where it is time; stop what has converged."""
        around, options = self._around, self._options
        if (around.held_out is None and around.score is None) or not self._stage.groups:
            return {}, None
        if step % options.evaluate_every and step != self._total:
            return {}, None
        with self._average.shown():
            losses: dict[str, float] = {}
            if around.held_out is not None:
                losses = evaluate(self._stage, around.held_out, recorded=around.recorded)
            score = around.score() if around.score is not None else None
        if score is not None:
            self._curves.scores.append((step, score))
        for edit, loss in losses.items():
            if math.isfinite(loss):
                self._curves.held_out.setdefault(edit, []).append((step, loss))
        losses = {edit: loss for edit, loss in losses.items() if math.isfinite(loss)}
        for edit in list(self._stage.groups):
            history = self._curves.held_out.get(edit, [])
            if step < self._total and options.patience and converged(history, options.patience, options.min_gain):
                self._average.settle(edit)
                reason = f"step {step}: held-out loss {history[-1][1]:.4g} has converged"
                self._halt(edit, Stop(step=step, kind="converged", reason=reason))
        return losses, score

    def _tensors(self) -> dict[str, Tensor]:
        states = checkpoints.optimizer_state(self._optimizer)
        return {**self._stage.tensors(), **self._masters.tensors(), **self._average.tensors(), **states}

    def _save(self, step: int, over: bool) -> bool:
        """Write a checkpoint. One that cannot be written is passed over with a warning, but for the stage's last."""
        try:
            self._journal.write(self._number, step, self._tensors(), over=over)
        except PpclError as error:
            if over:
                raise
            _log.warning("%s; training goes on from memory, the checkpoint before is whole", error)
            return False
        return True

    def _leave(self, step: int, saved: bool) -> NoReturn:
        """Save and raise `Stopped`. Before the first step there is nothing to save, or the stage before was saved."""
        asked = self._around.asked
        where = f"stopped by {asked.words} at stage {self._curves.label}, step {step} of {self._total}"
        if step == 0 and self._number == 0:
            raise Stopped(f"{where}; nothing was trained yet", asked.code)
        if not saved and step > 0:
            try:
                over = step == self._total or not self._stage.groups
                self._journal.write(self._number, step, self._tensors(), over=over)
            except PpclError as error:
                raise Stopped(f"{where}; not saved: {error}", asked.code) from None
        raise Stopped(f"{where}; saved, go on with --resume", asked.code)


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Fetch all scalars from the device at once."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
