"""What the builder tells while it works, and how it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ppcl_fx.export.tensorrt_api import Api

LOOK = 0.2
"""Seconds after which a waiting thread looks for Ctrl-C: a signal just before it waits does not wake it."""

T = TypeVar("T")
Report = Callable[[int, int, str], None]
"""Called with the share that is done in percent, with 100, and with the name of the phase."""


@dataclass
class _Phase:
    steps: int
    done: int = 0


class Monitor:
    """Turns TensorRT's nested phases into one share from 0 to 100, and tells TensorRT when to stop.

    TensorRT calls it from several threads at once.
    """

    def __init__(self, report: Report | None = None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}  # outermost first
        self._stop = threading.Event()
        self._shown = (-1, "")

    @property
    def stopped(self) -> bool:
        """Whether the build is to end early."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Let the build end at its next step."""
        self._stop.set()

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
            self._phases[name] = _Phase(max(1, steps))
            self._show(name)

    def step_complete(self, name: str, step: int) -> bool:
        """A step, counted from 0, is done. Returns whether to go on."""
        with self._lock:
            if name in self._phases:
                phase = self._phases[name]
                phase.done = max(phase.done, min(step + 1, phase.steps))
                self._show(name)
        return not self._stop.is_set()

    def phase_finish(self, name: str) -> None:
        """A phase ends, early perhaps."""
        with self._lock:
            if len(self._phases) == 1 and name in self._phases:
                self._phases[name].done = self._phases[name].steps
                self._show(name)
            self._phases.pop(name, None)

    def _show(self, name: str) -> None:
        share, width = 0.0, 1.0
        for phase in self._phases.values():
            share += width * phase.done / phase.steps
            width *= 1 / phase.steps if phase.done < phase.steps else 0.0
        percent = max(self._shown[0], min(100, int(100 * share + 1e-9)))  # a bar does not run backwards
        if (percent, name) != self._shown:
            self._shown = (percent, name)
            if self._report is not None:
                self._report(percent, 100, name)


class Messages:
    """Keeps what TensorRT says is wrong, so that the one line of an error can say why."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def logger(self, api: Api) -> Any:
        """Return a logger for TensorRT that reports here."""
        worst = {int(api.value("ILogger.Severity.INTERNAL_ERROR")), int(api.value("ILogger.Severity.ERROR"))}

        def log(severity: Any, msg: str) -> None:
            if int(severity) in worst:
                self.errors.append(" ".join(str(msg).split()))

        return api.implement("ILogger", log=log)

    def why(self) -> str:
        """Return the last message in brackets, or nothing where there is none."""
        return f" ({self.errors[-1]})" if self.errors else ""


def stoppable(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run `work` in a thread, so that Ctrl-C reaches Python while TensorRT is at work, and return its result.

    Args:
        work: the build.
        stop: asks the build to end soon. It is called when this thread is interrupted; what interrupted it is raised
            again as soon as the build has ended.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    begun, done = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  it is raised below, in the thread that waits
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="tensorrt-build")
    try:
        thread.start()  # which waits for the thread, and may be interrupted too
        while not done.wait(LOOK):
            pass
    except BaseException:
        stop()
        if begun.wait(1):
            done.wait()  # not join: a join that was interrupted takes the thread for ended (Python 3.11 and 3.12)
        raise
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
