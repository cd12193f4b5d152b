"""What a person sees while a command works: progress and notes, all of it on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from ppcl_fx.cli.boundary import printable
from ppcl_fx.io.memory import size_words

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from ppcl_fx.train.metrics.logger import LogRow


class ProgressReport(Protocol):
    """Called with the steps done, the steps in all, and what to call them now if not what they were called."""

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Show that `done` of `total` steps are done."""


QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0
WATCH_SECONDS = 60.0
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


class Terminal:
    """Progress bars on a terminal, a line now and then where stderr is a file; nothing where it is `silent`.

    `verbose` adds notes and log lines.
    """

    def __init__(self, verbose: bool = False, silent: bool = False) -> None:
        self.verbose = verbose and not silent
        self._silent = silent
        _set_up_libraries(self.verbose)

    def note(self, line: str) -> None:
        """Say something that only `-v` wants to know."""
        if self.verbose:
            _say(line)

    @contextmanager
    def step(self, label: str) -> Iterator[ProgressReport]:
        """Show how far one step of the work is; the block reports by calling what it is given."""
        started = time.monotonic()
        show = nullcontext(_nothing) if self._silent else _bar(label) if sys.stderr.isatty() else _lines(label)
        with show as report:
            yield report
        self.note(f"{label}: {time.monotonic() - started:.1f} s")


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)  # noqa: T201


def _nothing(done: int, total: int, label: str = "") -> None:
    """Show nothing."""


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Hide diffusers' own bars while a model loads: the step has one, or is short."""
    from diffusers.utils import logging as diffusers_logging

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def _progress(last: ProgressColumn, width: int = 40) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(width), MofNCompleteColumn(), TimeElapsedColumn(), last)
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextmanager
def _bar(label: str) -> Iterator[ProgressReport]:
    from rich.progress import TimeRemainingColumn

    with _progress(TimeRemainingColumn()) as bars:
        task = bars.add_task(label, total=None)

        def report(done: int, total: int, label: str = label) -> None:
            bars.update(task, completed=done, total=total, description=label)

        yield report


@contextmanager
def _lines(label: str) -> Iterator[ProgressReport]:
    """Where no bar can be drawn: one line after two seconds, then one every ten, with the time that is left."""
    started = time.monotonic()
    due = started + QUIET_SECONDS
    first: int | None = None

    def report(done: int, total: int, label: str = label) -> None:
        nonlocal due, first, started
        now = time.monotonic()
        if first is None or done < first:
            # A run that goes on from an earlier one, or the next part of the work, does not begin at 0.
            first, started = done, now
        if now >= due:
            due = now + LINE_SECONDS
            left = (now - started) / (done - first) * (total - done) if done > first else 0.0
            more = f", about {time_words(left)} left" if left else ""
            _say(f"{label}: {done} of {total}{more}")

    yield report


def time_words(seconds: float) -> str:
    """Write a span of time for a person: ``40 s``, ``12 min``, ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class _Lines(logging.Formatter):
    """Log lines as a terminal may show them: a path in one may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def _set_up_libraries(verbose: bool) -> None:
    """Libraries keep quiet unless asked; must come before they are imported."""
    level = "warning" if verbose else "error"
    os.environ.setdefault("DIFFUSERS_VERBOSITY", level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    logging.basicConfig(level=logging.WARNING if verbose else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines("%(name)s: %(message)s"))
    logging.getLogger("ppcl_fx").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")


def watching(clock: Callable[[], float] = time.monotonic) -> AbstractContextManager[Callable[[LogRow], None]]:
    """Yield what is to be told each step's row; it shows them on stderr."""
    return _row_bar() if sys.stderr.isatty() else nullcontext(_row_lines(clock))


def words(row: LogRow) -> str:
    """Say in one line where a training stands: no estimate of the end before there is one."""
    parts = [
        f"loss {row.loss:.4g}",
        f"held-out {sum(row.held_out.values()):.4g}" if row.held_out else "",
        "" if row.score is None else f"score {row.score:.3f}",
        "" if row.samples_per_second is None else f"{row.samples_per_second:.3g} samples/s",
        _flops(row.flops_per_second) if row.flops_per_second else "",
        f"peak {size_words(row.peak_bytes)}",
        f"about {time_words(row.left)} left in this stage" if row.left else "",
    ]
    return f"{row.stage}: {row.step} of {row.steps}, {', '.join(filter(None, parts))}"


def _flops(rate: float) -> str:
    size, prefix = next((pair for pair in _PREFIXES if rate >= pair[0]), (1.0, ""))
    return f"{rate / size:.3g} {prefix}FLOP/s" if prefix else f"{rate:.0f} FLOP/s"


def _row_lines(clock: Callable[[], float]) -> Callable[[LogRow], None]:
    due = clock()  # the first step has a line, so that one knows that it runs

    def show(row: LogRow) -> None:
        nonlocal due
        for edit, reason in row.stopped.items():
            _say(f"{row.stage}: {edit} stopped, {reason}")
        now = clock()
        if now >= due or row.step == row.steps:
            due = now + WATCH_SECONDS
            _say(words(row))

    return show


@contextmanager
def _row_bar() -> Iterator[Callable[[LogRow], None]]:
    from rich.progress import TextColumn

    # rich's own estimate knows nothing of evaluations, checkpoints and students that stopped: ours does.
    with _progress(TextColumn("{task.fields[facts]}"), width=20) as bars:
        task = bars.add_task("training", total=None, facts="")

        def show(row: LogRow) -> None:
            for edit, reason in row.stopped.items():
                bars.console.print(printable(f"{row.stage}: {edit} stopped, {reason}"), markup=False)
            facts = words(row).partition(", ")[2]
            bars.update(task, completed=row.step, total=row.steps, description=row.stage, facts=facts)

        yield show
