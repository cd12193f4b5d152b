"""The training core: what one stage does at each step, whatever schedule it runs under.

`ppcl_fx.train.core.loop` trains all edits of a stage in one pass over the model, `ppcl_fx.train.bounded` one edit after
the other from the teacher's cached values.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.schema.curves import Stop
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.checkpoints import CheckpointWriter, LoadedCheckpoint
from ppcl_fx.train.core.optimizer import EMA, MasterWeights, clip, factor, make_optimizer
from ppcl_fx.train.core.stages import Stage
from ppcl_fx.train.distributed.consensus import StopRequest

BatchPart = tuple[float, Callable[[], tuple[Any, Tensor | None]]]
"""Some of a batch: its share of it, and what gives the stage's input and the teacher's recorded output."""
_log = logging.getLogger("ppcl_fx.train")


class Draw(Protocol):
    """What a stage's steps draw from: batches by number, the same ones whenever they are asked for."""

    def parts(self, position: int) -> Iterable[BatchPart]:
        """Return the parts of a batch; they go through the stage one after the other, and their gradients add up."""

    def samples(self, position: int) -> int:
        """Return the number of samples in that batch."""

    def names(self, position: int) -> str:
        """Return what that batch is made of, for a message."""


@dataclass(frozen=True)
class Step:
    """What a step gave: each edit's loss and gradient norm, the learning rate, and how many samples it took."""

    losses: dict[str, float]
    norms: dict[str, float]
    rate: float
    samples: int


class StageTrainer:
    """Trains one stage: steps, evaluations, edits that stop, checkpoints.

    Args:
        stage: What trains.
        draw: Its data.
        writer: Its checkpoints; the last of its curves are the stage's.
        config: The options.
        total: Steps in all, of which `done` are done.
        held_out: Give batches of calls that are never trained on, each in its parts.
        score: Called at each evaluation; what it returns is noted.
        stop: Whether a signal wants the run to stop.
    """

    def __init__(
        self,
        stage: Stage,
        draw: Draw,
        writer: CheckpointWriter,
        config: TrainConfig,
        total: int,
        held_out: Sequence[Callable[[], Iterable[BatchPart]]] = (),
        score: Callable[[], float] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.stage, self.writer, self.total = stage, writer, total
        # Asking whether several ranks' request is true would ask all of them.
        self.stop = StopRequest() if stop is None else stop
        self.done, self.curves = 0, writer.curves[-1]
        self._draw, self._config, self._held_out, self._score = draw, config, held_out, score
        self._lr = config.finetune_lr if self.curves.name == "finetune" else config.lr
        self._parameters = {edit: list(parameters) for edit, parameters in stage.groups.items()}
        self._masters = MasterWeights(stage.groups)
        self._ema = EMA(self._masters, config.ema)
        how = config.optimizer, config.betas, config.weight_decay
        self._optimizer = make_optimizer(self._masters.groups, self._lr, *how)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train: all steps are done, or every edit has stopped."""
        return self.done >= self.total or not self.stage.groups

    def restore(self, start: LoadedCheckpoint) -> None:
        """Go on from a checkpoint, whose students and curves `writer` has restored."""
        tensors = start.tensors
        for edit in self.curves.stopped:
            self._ema.forget(edit)
        checkpoints.set_tensors(self._tensors(), tensors)
        checkpoints.load_optimizer_state(self._optimizer, tensors)
        if self.writer.device is not None:
            checkpoints.set_rng_state(tensors, self.writer.device)
        for edit in self.curves.stopped:
            self._drop(edit)
        self.done = start.state.step

    def step(self, counted: AbstractContextManager[None] | None = None) -> Step | None:
        """Do one step, its forward and backward passes inside of `counted`; return None where a signal came first.

        An edit whose loss or gradient is not finite stops with its last good weights. Raises PpclError where no edit
        is left that could go on, or edits are not separate: the line names the stage, the step, the edit and the
        calls. No update was done, so the last checkpoint is good.
        """
        began, count = time.perf_counter(), self._config.accumulate
        rate = self._lr * factor(self.done, self.total, self._config.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        positions = range(self.done * count, (self.done + 1) * count)
        found: list[dict[str, Tensor]] = []
        samples = 0
        with counted or nullcontext():
            for position in positions:
                if self.stop:
                    return None
                found.append(self._gradients(position, 1.0 / count))
                samples += self._draw.samples(position)
        active = {edit: self._masters.groups[edit] for edit in self.stage.groups}
        norms = _numbers(self.stage.norms(clip(active, self._config.clip)))
        losses = [_numbers(batch) for batch in found]
        bad = self._not_finite(positions, losses, norms)
        for edit, reason in bad.items():
            self._give_up(edit, self.done, reason)
        if self.stage.groups:
            self._optimizer.step()
            self._masters.write_back()
            self._ema.update(self.done)
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        means = {edit: sum(batch[edit] for batch in losses) / count for edit in losses[0] if edit not in bad}
        if means:
            self.curves.append(means)
        self.curves.seconds += time.perf_counter() - began
        return Step(means, {edit: norm for edit, norm in norms.items() if edit not in bad}, rate, samples)

    def evaluate(self) -> tuple[dict[str, float], float | None]:
        """Return the held-out losses and the score, where it is time for them; stop what has converged."""
        config = self._config
        if not (self._held_out or self._score) or not self.stage.groups:
            return {}, None
        if self.done % config.evaluate_every and self.done != self.total:
            return {}, None
        began = time.perf_counter()
        with self._ema.shown():
            found = self._held_out_losses() if self._held_out else {}
            score = self._score() if self._score is not None else None
        if score is not None:
            self.curves.scores.append((self.done, score))
        losses = {edit: loss for edit, loss in found.items() if math.isfinite(loss)}
        for edit, loss in losses.items():
            self.curves.held_out.setdefault(edit, []).append((self.done, loss))
        self.curves.seconds += time.perf_counter() - began
        for edit in list(self.stage.groups):
            history = self.curves.held_out.get(edit, [])
            if self.done < self.total and config.patience and converged(history, config.patience, config.min_gain):
                self._ema.settle(edit)
                reason = f"step {self.done}: held-out loss {history[-1][1]:.4g} has converged"
                self._halt(edit, Stop(step=self.done, kind="converged", reason=reason))
        return losses, score

    def checkpoint(self) -> bool:
        """Write a checkpoint where one is due, after a look at the weights; tell whether it was written.

        One that cannot be written is passed over with a warning, but for the stage's last.
        """
        over = self.over
        if not over and self.done % self._config.every:
            return False
        self._look_at_weights()
        try:
            self.write(over)
        except PpclError as error:
            if over:
                raise
            _log.warning("%s; training goes on from memory, the checkpoint before is whole", error)
            return False
        return True

    def write(self, over: bool) -> None:
        """Write a checkpoint. Raises PpclError where it cannot be written; those before are whole."""
        states = checkpoints.optimizer_state(self._optimizer)
        self.writer.write(self.done, {**self._tensors(), **states}, over=over)

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.stage.tensors(), **self._masters.tensors(), **self._ema.tensors()}

    def settle(self) -> None:
        """End the stage: look at the weights, and make the averages the weights."""
        self._look_at_weights()
        for edit in list(self.stage.groups):
            self._ema.settle(edit)
        self._optimizer.zero_grad(set_to_none=True)

    def _gradients(self, position: int, scale: float) -> dict[str, Tensor]:
        """Add a batch's gradients and return each edit's loss."""

        def step(share: float, batch: Any, target: Tensor | None) -> dict[str, Tensor]:
            found = self.stage.step(batch, target=target, scale=share * scale)
            self._masters.take_gradients()
            return found

        return _summed(self._draw.parts(position), step)

    def _held_out_losses(self) -> dict[str, float]:
        """Each edit's mean loss on the held-out calls, every batch with the same weight; the random state stays."""

        def evaluate(share: float, batch: Any, target: Tensor | None) -> dict[str, Tensor]:
            return self.stage.evaluate(batch, target=target)

        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            found = [_numbers(_summed(parts(), evaluate)) for parts in self._held_out]
        return {edit: sum(losses[edit] for losses in found) / len(found) for edit in found[0]}

    def _not_finite(
        self, positions: Sequence[int], losses: list[dict[str, float]], norms: dict[str, float]
    ) -> dict[str, str]:
        """Return edit id -> what is wrong, for each edit whose loss or gradient is not finite."""
        bad: dict[str, str] = {}
        for position, values in zip(positions, losses, strict=True):
            for edit, value in values.items():
                if not math.isfinite(value):
                    bad.setdefault(edit, f"the loss of {edit} is {value} ({self._draw.names(position)})")
        for edit, value in norms.items():
            if not math.isfinite(value):
                names = "; ".join(map(self._draw.names, positions))
                bad.setdefault(edit, f"the gradient norm of {edit} is {value} ({names})")
        alone = self.writer.beginning is not None  # other students are not in this stage, and go on
        if bad and (not self.stage.separate or (len(bad) == len(norms) and not alone)):
            raise self._broken(self.done + 1, next(iter(bad.values())))
        return bad

    def _broken(self, step: int, reason: str, mend: str = "") -> PpclError:
        mend = mend or "the last checkpoint is good, train again with a smaller learning rate"
        return PpclError(f"stage {self.curves.label}, step {step}: {reason}; {mend}")

    def _look_at_weights(self) -> None:
        """Before they are saved: give up an edit whose last update overflowed, which no loss has shown yet."""
        for edit in list(self.stage.groups):
            if self._finite(edit):
                continue
            reason = f"the update left weights of {edit} that are not finite"
            if not self.stage.separate:
                raise self._broken(self.done, reason)
            self._give_up(edit, self.done - 1, reason)

    def _finite(self, edit: str) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self._masters.groups[edit])

    def _give_up(self, edit: str, done: int, reason: str) -> None:
        """Stop an edit whose loss is NaN, with the weights of its last good update."""
        if self._finite(edit):
            self._ema.settle(edit)
            kept = "its last good weights are kept"
        else:
            # Gradients were finite in every update, so this is an overflow of the update itself.
            self._ema.forget(edit)
            kept = self.writer.go_back(self._parameters[edit])
            if not kept:
                raise self._broken(done + 1, reason, "train again with a smaller lr")
            self._masters.read_back(self._parameters[edit])
        self._halt(edit, Stop(step=done, kind="nan", reason=f"step {done + 1}: {reason}; {kept}"))

    def _halt(self, edit: str, stop: Stop) -> None:
        """Train an edit no further, and say so."""
        self.curves.stopped[edit] = stop
        self._drop(edit)
        level = logging.WARNING if stop.kind == "nan" else logging.INFO
        _log.log(level, "stage %s: %s stopped, %s", self.curves.label, edit, stop.reason)

    def _drop(self, edit: str) -> None:
        """Keep nothing for an edit that only training needs."""
        for parameter in self._masters.groups[edit]:
            parameter.grad = None
            self._optimizer.state.pop(parameter, None)
        self.stage.stop(edit)


def converged(history: Sequence[tuple[int, float]], patience: int, min_gain: float) -> bool:
    """Tell whether the last `patience` evaluations brought no gain: none was below the best loss before it by
    the share `min_gain` of it. `history` holds steps done and held-out losses, oldest first.
    """
    best, idle = math.inf, 0
    for _, loss in history:
        if loss < best * (1.0 - min_gain):
            best, idle = loss, 0
        else:
            idle += 1
    return idle >= patience


def _summed(
    parts: Iterable[BatchPart], run: Callable[[float, Any, Tensor | None], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return each edit's loss on a batch: the sum over its parts by their shares of it."""
    losses: dict[str, Tensor] = {}
    for share, give in parts:
        for edit, loss in run(share, *give()).items():  # the part is gone before the next one is there
            losses[edit] = losses[edit] + share * loss if edit in losses else share * loss
    return losses


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Fetch all scalars from the device at once."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
