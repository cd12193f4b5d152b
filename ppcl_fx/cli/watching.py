"""What a person sees of a training: a bar with losses and speed, or, where stderr is a file, a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ppcl_fx.cli.boundary import printable
from ppcl_fx.cli.terminal import time_words
from ppcl_fx.memory import size_words

if TYPE_CHECKING:
    from ppcl_fx.train.watch import Row

LINE_SECONDS = 60.0
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@contextmanager
def watching(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[Row], None]]:
    """Yield what is to be told each step's row; it shows them on stderr."""
    if sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _lines(clock)


def words(row: Row) -> str:
    """Say in one line where a training stands: no estimate of the end before there is one."""
    parts = [f"loss {row.loss:.4g}"]
    if row.held_out:
        parts.append(f"held-out {sum(row.held_out.values()):.4g}")
    if row.score is not None:
        parts.append(f"score {row.score:.3f}")
    if row.samples_per_second is not None:
        parts.append(f"{row.samples_per_second:.3g} samples/s")
    if row.flops_per_second:
        parts.append(_flops(row.flops_per_second))
    parts.append(f"peak {size_words(row.peak_bytes)}")
    if row.left:
        parts.append(f"about {time_words(row.left)} left in this stage")
    return f"{row.stage}: {row.step} of {row.steps}, {', '.join(parts)}"


def _flops(rate: float) -> str:
    for size, prefix in _PREFIXES:
        if rate >= size:
            return f"{rate / size:.3g} {prefix}FLOP/s"
    return f"{rate:.0f} FLOP/s"


def _lines(clock: Callable[[], float]) -> Callable[[Row], None]:
    due = clock()  # the first step has a line, so that one knows that it runs

    def show(row: Row) -> None:
        nonlocal due
        for edit, reason in row.stopped.items():
            _say(f"{row.stage}: {edit} stopped, {reason}")
        now = clock()
        if now >= due or row.step == row.steps:
            due = now + LINE_SECONDS
            _say(words(row))

    return show


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _bar() -> Iterator[Callable[[Row], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # rich's own estimate knows nothing of evaluations, checkpoints and students that stopped: ours does.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("training", total=None, facts="")

        def show(row: Row) -> None:
            for edit, reason in row.stopped.items():
                bars.console.print(printable(f"{row.stage}: {edit} stopped, {reason}"), markup=False)
            facts = words(row).partition(", ")[2]
            bars.update(task, completed=row.step, total=row.steps, description=row.stage, facts=facts)

        yield show
