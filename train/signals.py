"""SIGTERM and Ctrl-C: the step is given up, a checkpoint is written, and the run leaves with one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The signals that are listened to, and the exit codes that they ask for."""


class StopRequest:
    """Whether a signal has asked to stop, and which one."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.by is not None

    @property
    def words(self) -> str:
        """The signal for a message."""
        return "Ctrl-C" if self.by is signal.SIGINT else self.by.name if self.by else ""

    @property
    def code(self) -> int:
        """The exit code that the signal asks for."""
        return CODES[self.by] if self.by is not None else 0


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Let the first SIGTERM or Ctrl-C only be noted; a second one does what it did before.

    Outside of the main thread, where Python lets nobody listen, nothing is changed.
    """
    asked = StopRequest()
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
