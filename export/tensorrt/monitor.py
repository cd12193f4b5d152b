"""What the builder tells while it works, and how it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from ppcl_fx.export.tensorrt_api import Api, short

LOOK = 0.2
"""Seconds after which a waiting thread looks for Ctrl-C: a signal just before it waits does not wake it."""

T = TypeVar("T")
Report = Callable[[int, int, str], None]
"""Called with the share that is done in percent, with 100, and with the name of the phase."""


def silent(done: int, total: int, phase: str) -> None:
    """Report nothing."""


class Monitor:
    """Turns TensorRT's nested phases into one share from 0 to 100, and ends a build soon after `stop` is set.

    TensorRT calls it from several threads at once.
    """

    def __init__(self, report: Report = silent) -> None:
        self._report = report
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, int]] = {}  # steps done and all steps, the outermost phase first
        self._shown = (-1, "")

    def attach(self, api: Api, config: Any) -> Any:
        """Let a builder's configuration report here; the object returned must live as long as the build."""
        callback = api.implement(
            "IProgressMonitor",
            phase_start=self.phase_start,
            step_complete=self.step_complete,
            phase_finish=self.phase_finish,
        )
        api.set("IBuilderConfig.progress_monitor", config, callback)
        return callback

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins."""
        with self._lock:
            self._phases[name] = (0, max(1, steps))
            self._show(name)

    def step_complete(self, name: str, step: int) -> bool:
        """A step, counted from 0, is done. Returns whether to go on."""
        with self._lock:
            if name in self._phases:
                done, steps = self._phases[name]
                self._phases[name] = (max(done, min(step + 1, steps)), steps)
                self._show(name)
        return not self.stop.is_set()

    def phase_finish(self, name: str) -> None:
        """A phase ends, early perhaps."""
        with self._lock:
            if list(self._phases) == [name]:
                steps = self._phases[name][1]
                self._phases[name] = (steps, steps)
                self._show(name)
            self._phases.pop(name, None)

    def _show(self, name: str) -> None:
        share, width = 0.0, 1.0
        for done, steps in self._phases.values():
            share += width * done / steps
            width *= 1 / steps if done < steps else 0.0
        percent = max(self._shown[0], min(100, int(100 * share + 1e-9)))  # a bar does not run backwards
        if (percent, name) != self._shown:
            self._shown = (percent, name)
            self._report(percent, 100, name)


class Messages:
    """Keeps what a library tells its `logger` that is wrong, so that the one line of an error can say why; `tell` gets
    each at once, for a process that may not live to say it.
    """

    def __init__(self, api: Api, tell: Callable[[str], None] = lambda said: None) -> None:
        self.errors: list[str] = []
        worst = {int(api.value("ILogger.Severity.INTERNAL_ERROR")), int(api.value("ILogger.Severity.ERROR"))}

        def log(severity: Any, msg: str) -> None:
            # Where there is no GPU, what asks for one is said at every turn, and is never why a build fails.
            if int(severity) in worst and not (api.gpu is None and "cudaError" in str(msg)):
                self.errors.append(short(str(msg)))
                tell(self.errors[-1])

        self.logger = api.implement("ILogger", log=log)

    def why(self) -> str:
        """Return the last message in brackets, or nothing where there is none."""
        return f" ({self.errors[-1]})" if self.errors else ""


def stoppable(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run `work` in a thread, so that Ctrl-C reaches Python while TensorRT is at work, and return its result.

    What interrupts this thread calls `stop`, which asks the work to end soon, and is raised again when it has ended.
    """
    building: Future[T] = Future()

    def run() -> None:
        if building.set_running_or_notify_cancel():
            try:
                building.set_result(work())
            except BaseException as error:  # noqa: BLE001  it is raised below, in the thread that waits
                building.set_exception(error)

    try:
        threading.Thread(target=run, name="tensorrt-build").start()  # waits for the thread, and may be interrupted too
        while not wait([building], LOOK).done:
            pass
    except BaseException:
        stop()
        if not building.cancel():
            wait([building])  # not join: one that was interrupted takes the thread for ended (Python 3.11 and 3.12)
        raise
    return building.result()
