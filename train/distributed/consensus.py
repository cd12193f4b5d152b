"""What the processes of a run agree on: what they can do, where they begin, when a signal stops them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.passes.calibration.initialise import fit_projectors
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.checkpoints import CheckpointWriter, LoadedCheckpoint
from ppcl_fx.train.core.stages import Stage
from ppcl_fx.train.distributed.process_group import ALONE, ProcessGroup

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # the signals that are listened to, and their exit codes


def refuse_on_ranks(ranks: ProcessGroup, options: TrainConfig, scored: bool) -> None:
    """Raise PpclError for what only one process can do."""
    sequential = "sequential distillation feeds each student the one before it, and is not split over ranks; "
    eight_bit = options.optimizer == "adamw8bit" and "finetune" in options.stages
    for asked, why in (
        (options.sequential, sequential),
        (eight_bit, "training option optimizer: adamw8bit does not know sharded parameters; take adamw, or "),
        (scored, "no rank has the whole model while it trains, so it cannot be scored on the way; "),
    ):
        if asked and not ranks.alone:
            raise PpclError(f"{why}run it on one process")


class StopRequest:
    """Whether a signal has asked to stop, and which one; of several ranks, whether it asked any of them.

    All ranks ask this at the same points, and get the same answer.
    """

    def __init__(self, ranks: ProcessGroup = ALONE) -> None:
        self.by: signal.Signals | None = None
        self._ranks = ranks

    def __bool__(self) -> bool:
        """Ask the others. Raises PpclError where one is lost."""
        if not self._ranks.any(self.by is not None):
            return False
        self.by = max(by for by in self._ranks.gather(self.by) if by is not None)
        return True

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

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        asked.by = signal.Signals(signum)
        restore()

    for known in CODES:
        before[known] = signal.getsignal(known) or signal.SIG_DFL
        signal.signal(known, note)
    try:
        yield asked
    finally:
        restore()


def begin(ranks: ProcessGroup, find: Callable[[], LoadedCheckpoint | None]) -> LoadedCheckpoint | None:
    """Let rank 0 look for the checkpoint to go on from, and have every rank open the same one. Raises PpclError, on all
    ranks, where rank 0 found a fault.
    """
    found = ranks.each(lambda: find() if ranks.first else None)
    where = ranks.from_first("" if found is None else str(found.folder))
    return checkpoints.read(Path(where), check=False) if where and not ranks.first else found


def share_checkpoints(
    ranks: ProcessGroup, stage: Stage, writer: CheckpointWriter, start: LoadedCheckpoint | None
) -> LoadedCheckpoint | None:
    """Have several ranks write a stage's checkpoints together; return what `start` holds for this one."""
    if ranks.alone:
        return start
    from ppcl_fx.train.distributed.distributed_checkpoint import DistributedCheckpoints  # slow to import

    shared = DistributedCheckpoints(ranks, stage, writer.students)
    writer.save = shared.save
    return shared.local(start) if start is not None else None


def fit_again(model: PluggableModel, calls: Iterable[Mapping[str, Any]], ranks: ProcessGroup) -> None:
    """Fit the projectors in students to what "depth" made of these; every rank gets the first one's."""
    home = model.device
    fitted = fit_projectors(model.graph, calls, in_students=True, device=ranks.device)
    model.graph.to(home)
    for path in fitted:
        for parameter in model.graph.get_submodule(path).parameters():
            ranks.broadcast(parameter, 0)
