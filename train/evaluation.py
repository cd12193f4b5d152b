"""Evaluation on held-out calls, and when a student has converged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ppcl_fx.train.data import Batches
from ppcl_fx.train.stages import FineTuning, Stage

History = Sequence[tuple[int, float]]
"""(Steps done, held-out loss), oldest first."""
CHECKED = 8
"""Kinds of batches whose recorded outputs are compared with the teacher's."""


def evaluate(stage: Stage, feed: Batches, *, recorded: bool = False) -> dict[str, float]:
    """Return each edit's mean loss over one epoch of `feed`, every batch with the same weight.

    Args:
        stage: Not changed; neither is the random state.
        feed: The held-out calls.
        recorded: Take the recorded outputs of the teacher as targets where there are any.
    """
    sums: dict[str, float] = {}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        for step in range(len(feed)):
            target = feed.target(step) if recorded else None
            losses = stage.evaluate(feed.kwargs(step), target=target)
            for edit, loss in losses.items():
                sums[edit] = sums.get(edit, 0.0) + float(loss)
    return {edit: value / len(feed) for edit, value in sums.items()}


def converged(history: History, patience: int, min_gain: float) -> bool:
    """Tell whether the last `patience` evaluations brought no gain: none was below the best loss before it by
    the share `min_gain` of it.
    """
    best, idle = math.inf, 0
    for _, loss in history:
        if loss < best * (1.0 - min_gain):
            best, idle = loss, 0
        else:
            idle += 1
    return idle >= patience


def outputs_are_the_teachers(stage: FineTuning, batches: Batches) -> bool:
    """Tell whether the recorded outputs are, to the bit, what the teacher gives in this stage.

    One batch of each kind (shapes, and number of calls) is compared, the same ones whenever this is asked, so that
    a resumed run decides as the first one did. Other precision, autocast or another machine may round differently;
    so may several calls in one batch.
    """
    seen: set[tuple[int, ...]] = set()
    for step in range(len(batches)):
        target = batches.target(step)
        if target is None:
            return False
        kind = (len(batches.indices(step)), *target.shape)
        if kind in seen or len(seen) >= CHECKED:
            continue
        seen.add(kind)
        computed = stage.target(batches.kwargs(step))
        if computed.dtype != target.dtype or not torch.equal(computed, target):
            return False
    return True
