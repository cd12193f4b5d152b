"""What the processes of a run agree on: what they can do, where they begin, when a signal stops them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.calibration.initialise import fit_projectors
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.checkpoints import LoadedCheckpoint
from ppcl_fx.train.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.train.core.checkpoints import CheckpointWriter
    from ppcl_fx.train.core.stages import Stage

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The signals that are listened to, and the exit codes that they ask for."""
FAULT = "!"
"""What rank 0's word begins with where it is about a fault."""


def refuse_on_ranks(ranks: ProcessGroup, options: TrainConfig, scored: bool) -> None:
    """Raise PpclError for what only one process can do."""
    if ranks.alone:
        return
    mend = "run it on one process"
    if options.sequential:
        raise PpclError(
            f"sequential distillation feeds each student the one before it, and is not split over ranks; {mend}"
        )
    if options.optimizer == "adamw8bit" and "finetune" in options.stages:
        raise PpclError(f"training option optimizer: adamw8bit does not know sharded parameters; take adamw, or {mend}")
    if scored:
        raise PpclError(f"no rank has the whole model while it trains, so it cannot be scored on the way; {mend}")


class StopRequest:
    """Whether a signal has asked to stop, and which one; of several ranks, whether it asked any of them.

    All ranks ask this at the same points, and get the same answer.

    Args:
        ranks: This process among the others.
    """

    def __init__(self, ranks: ProcessGroup | None = None) -> None:
        self.by: signal.Signals | None = None
        self._ranks = ranks or ProcessGroup()

    def __bool__(self) -> bool:
        """Ask the others. Raises PpclError where one is lost."""
        if self._ranks.alone:
            return self.by is not None
        given = torch.zeros(len(signal.Signals) + 64)
        if self.by is not None:
            given[int(self.by)] = 1
        found = self._ranks.sum(given).nonzero()
        if len(found):
            self.by = signal.Signals(int(found[-1]))
        return bool(len(found))

    @property
    def words(self) -> str:
        """The signal for a message."""
        return "Ctrl-C" if self.by is signal.SIGINT else self.by.name if self.by else ""

    @property
    def code(self) -> int:
        """The exit code that the signal asks for."""
        return CODES[self.by] if self.by is not None else 0


@contextmanager
def listening(ranks: ProcessGroup) -> Iterator[StopRequest]:
    """Let the first SIGTERM or Ctrl-C only be noted; a second one does what it did before.

    Outside of the main thread, where Python lets nobody listen, nothing is changed.
    """
    asked = StopRequest(ranks)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[signal.Signals, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        asked.by = signal.Signals(signum)
        for known, handler in before.items():
            signal.signal(known, handler)

    for known in CODES:
        before[known] = signal.getsignal(known) or signal.SIG_DFL
        signal.signal(known, note)
    try:
        yield asked
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def begin(ranks: ProcessGroup, find: Callable[[], LoadedCheckpoint | None]) -> LoadedCheckpoint | None:
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


def students_alone(ranks: ProcessGroup, start: LoadedCheckpoint, students: Mapping[str, Tensor]) -> LoadedCheckpoint:
    """Return a checkpoint with the tensors of the students; one process takes it as it is."""
    if ranks.alone:
        return start
    from ppcl_fx.train.distributed.distributed_checkpoint import students_of

    return students_of(start, students)


def share_checkpoints(
    ranks: ProcessGroup, stage: Stage, writer: CheckpointWriter, start: LoadedCheckpoint | None
) -> LoadedCheckpoint | None:
    """Have several ranks write a stage's checkpoints together; return what `start` holds for this one."""
    if ranks.alone:
        return start
    from ppcl_fx.train.distributed.distributed_checkpoint import DistributedCheckpoints

    shared = DistributedCheckpoints(ranks, stage, writer.students)
    writer.save = shared.save
    return shared.local(start) if start is not None else None


def heard(ranks: ProcessGroup) -> str:
    """Return rank 0's word on another rank. Raises PpclError where it is about a fault."""
    word = ranks.words("")
    if word.startswith(FAULT):
        raise PpclError(word.removeprefix(FAULT))
    return word


def fit_again(model: PluggableModel, calls: Iterable[Mapping[str, Any]], ranks: ProcessGroup) -> None:
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
