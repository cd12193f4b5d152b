"""The plain schedule: all edits of a stage in one pass over the model, step after step, until a signal or the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

from ppcl_fx.errors import PpclError, Stopped
from ppcl_fx.train.core.stage_trainer import BatchPart, StageTrainer
from ppcl_fx.train.data.source import Feed
from ppcl_fx.train.metrics.logger import MetricsLogger

Progress = Callable[[str, int, int, float], None]
"""Told after each step: the stage, the steps done, the stage's steps, and the sum of the losses."""


class Whole:
    """Batches that go through the model in one pass each, with the teacher's recorded outputs or without: a `Draw`."""

    def __init__(self, feed: Feed, recorded: bool) -> None:
        self._feed, self._recorded = feed, recorded
        self.samples, self.names = feed.samples, feed.names

    def parts(self, position: int) -> Iterator[BatchPart]:
        """Yield the batch as one part."""
        feed = self._feed
        yield 1.0, lambda: (feed.kwargs(position), feed.target(position) if self._recorded else None)


def run_stage(trainer: StageTrainer, watch: MetricsLogger, progress: Progress | None = None) -> None:
    """Train a stage to its end, from where its trainer stands; a checkpoint it was restored from need not be saved.

    Raises:
        PpclError: As `StageTrainer.step`.
        Stopped: A signal asked to stop; a checkpoint was written.
    """
    curves, saved = trainer.curves, trainer.done > 0
    watch.begin(curves.label, trainer.done, trainer.total)
    while not trainer.over:
        halted = set(curves.stopped)
        found = trainer.step(watch.step())
        if found is None:
            _leave(trainer, saved)
        seconds = watch.stepped(found.samples)
        losses, score = trainer.evaluate()
        stopped = {edit: stop.reason for edit, stop in curves.stopped.items() if edit not in halted}
        watch.row(
            trainer.done, seconds, losses=found.losses, lr=found.rate, norms=found.norms, held_out=losses, score=score,
            stopped=stopped,
        )  # fmt: skip
        if stopped:
            watch.changed()
        saved = trainer.checkpoint()
        if progress is not None:
            progress(curves.label, trainer.done, trainer.total, sum(found.losses.values()))
        if trainer.stop:
            _leave(trainer, saved)
    trainer.settle()


def _leave(trainer: StageTrainer, saved: bool) -> NoReturn:
    """Save and raise `Stopped`. Before the first step there is nothing to save, or the stage before was saved."""
    stop, done = trainer.stop, trainer.done
    where = f"stopped by {stop.words} at stage {trainer.curves.label}, step {done} of {trainer.total}"
    if done == 0 and len(trainer.writer.curves) == 1:
        raise Stopped(f"{where}; nothing was trained yet", stop.code)
    if not saved and done > 0:
        try:
            trainer.write(trainer.over)
        except PpclError as error:
            raise Stopped(f"{where}; not saved: {error}", stop.code) from None
    raise Stopped(f"{where}; saved, go on with --resume", stop.code)
