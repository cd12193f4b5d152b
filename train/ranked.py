"""What several ranks agree on in a run: what they can do, where they begin, when they stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.initialise import fit_projectors
from ppcl_fx.train import checkpoints
from ppcl_fx.train.checkpoints import Checkpoint
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.ranks import Ranks
from ppcl_fx.train.signals import StopRequest

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel
    from ppcl_fx.train.checkpoints import CheckpointWriter
    from ppcl_fx.train.stages import Stage

FAULT = "!"
"""What rank 0's word begins with where it is about a fault."""


def refuse_on_ranks(ranks: Ranks, options: TrainConfig, scored: bool) -> None:
    """Raise PpclError for what only one process can do."""
    if ranks.alone:
        return
    mend = "run it on one process"
    if options.sequential:
        raise PpclError(
            f"sequential distillation feeds each student the one before it, and is not split over ranks; {mend}"
        )
    if options.optimizer == "adamw8bit" and "finetune" in options.stages:
        raise PpclError(
            f"training option optimizer: adamw8bit does not know sharded parameters; take adamw, or {mend}"
        )
    if scored:
        raise PpclError(f"no rank has the whole model while it trains, so it cannot be scored on the way; {mend}")


def agreed(asked: StopRequest, ranks: Ranks) -> StopRequest:
    """Return what all ranks together were asked."""
    return asked if ranks.alone else AgreedStop(asked, ranks)


class AgreedStop(StopRequest):
    """Whether a signal asked any rank to stop: all ranks ask this at the same points, and get the same answer.

    Args:
        mine: What this rank was asked.
        ranks: This process among the others.
    """

    def __init__(self, mine: StopRequest, ranks: Ranks) -> None:
        super().__init__()
        self._mine, self._ranks = mine, ranks

    def __bool__(self) -> bool:
        """Ask the others. Raises PpclError where one is lost."""
        given = torch.zeros(len(signal.Signals) + 64)
        if self._mine.by is not None:
            given[int(self._mine.by)] = 1
        found = self._ranks.sum(given).nonzero()
        if len(found):
            self.by = signal.Signals(int(found[-1]))
        return self.by is not None


def begin(ranks: Ranks, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Let rank 0 look for the checkpoint to go on from, and have every rank open the same one.

    Raises:
        PpclError: Rank 0 found a fault, or a rank is lost.
    """
    if ranks.alone:
        return find()
    if not ranks.first:
        where = heard(ranks)
        return checkpoints.read(Path(where), check=False) if where else None
    try:
        found = find()
    except PpclError as error:
        ranks.words(f"{FAULT}{error}")
        raise
    ranks.words(str(found.folder) if found is not None else "")
    return found


def students_alone(ranks: Ranks, start: Checkpoint, students: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint with the tensors of the students; one process takes it as it is."""
    if ranks.alone:
        return start
    from ppcl_fx.train.together import students_of  # slow to import

    return students_of(start, students)


def share_checkpoints(
    ranks: Ranks, stage: Stage, writer: CheckpointWriter, start: Checkpoint | None
) -> Checkpoint | None:
    """Have several ranks write a stage's checkpoints together; return what `start` holds for this one."""
    if ranks.alone:
        return start
    from ppcl_fx.train.together import Together  # slow to import

    shared = Together(ranks, stage, writer.students)
    writer.save = shared.save
    return shared.local(start) if start is not None else None


def heard(ranks: Ranks) -> str:
    """Return rank 0's word on another rank. Raises PpclError where it is about a fault."""
    word = ranks.words("")
    if word.startswith(FAULT):
        raise PpclError(word.removeprefix(FAULT))
    return word


def fit_again(model: PluggableModel, calls: Iterable[Mapping[str, Any]], ranks: Ranks) -> None:
    """Fit the projectors in students to what "depth" made of these; every rank gets the first one's.

    Raises:
        PpclError: A call cannot be used, or a rank is lost.
    """
    home = model.device
    fitted = fit_projectors(model.graph, calls, in_students=True, device=ranks.device)
    model.graph.to(home)
    for path in fitted:
        for parameter in model.graph.get_submodule(path).parameters():
            ranks.broadcast(parameter, 0)
