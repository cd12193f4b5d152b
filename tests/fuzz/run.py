"""Running the fuzzer: one input after the other, each within bounds of time and memory, and what came of it."""

from __future__ import annotations

import collections
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from tests.fuzz import commands
from tests.fuzz.readers import Reader, build

SECONDS = 20
"""The longest that one input may take."""
KIBIBYTES = 2**20
"""How much the memory of the process may grow by one input."""
LINES = 1000
"""Characters that a refusal may have."""


class _Late(BaseException):
    """The time of an input is over."""


@dataclass
class Outcome:
    """What came of all inputs: how many of each kind, and the faults with the words that make them again."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


class Fuzzer:
    """Inputs by number: the same seed and number make the same input.

    Args:
        world: an empty folder, for the undamaged inputs.
        seed: of all inputs.
    """

    def __init__(self, world: Path, seed: int) -> None:
        self.world, self.seed = world, seed
        self.readers = build(world)
        self.whole = {name: self._undamaged(reader) for name, reader in self.readers.items()}

    def _undamaged(self, reader: Reader) -> Any:
        with _copied(self.world / reader.folder) as folder:
            return reader.read(folder)

    def input(self, number: int, outcome: Outcome, only: str | None = None) -> None:
        """Make input `number`, read it, and note what came of it."""
        rng = random.Random(f"{self.seed}.{number}")
        names = [*self.readers, "command", "command", "command"]
        name = only or rng.choice(names)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with _within(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, words = self._command(rng) if name == "command" else self._file(rng, name)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > KIBIBYTES:
            kind, words = "fault", f"{words}: took {grown >> 10} MiB"
        outcome.counts[kind] += 1
        if kind == "fault":
            outcome.faults.append(f"--seed {self.seed} --only {number} ({name}): {words}")

    def _file(self, rng: random.Random, name: str) -> tuple[str, str]:
        reader = self.readers[name]
        file = rng.choice(sorted(reader.files))
        with _copied(self.world / reader.folder) as folder:
            how = f"{file}: {rng.choice(reader.files[file])(rng, folder / file)}"
            return _outcome(how, lambda: self._judged(reader, self.whole[name], folder))

    def _judged(self, reader: Reader, whole: Any, folder: Path) -> str:
        found = reader.read(folder)
        if found == whole:
            return "the same"
        if isinstance(whole, frozenset) and found and found < whole:
            return "a part"  # of several ratios, one whose manifest is gone is as good as never exported
        if not reader.free:
            raise AssertionError("another result")
        if reader.theirs is not None and found != reader.theirs(folder):
            raise AssertionError("another result than the other library's")
        return "another input"

    def _command(self, rng: random.Random) -> tuple[str, str]:
        arguments = commands.drawn(rng)
        with _copied(self.world) as folder:
            said: list[Any] = []

            def judged() -> str:
                code, words = commands.run(folder, arguments)
                wrong = commands.fault(code, words)
                said.append(wrong)
                if wrong is not None:
                    raise AssertionError(wrong)
                return "refused" if code else "taken"

            return _outcome(repr(arguments)[:400], judged)


def _outcome(how: str, judged: Callable[[], str]) -> tuple[str, str]:
    try:
        return judged(), how
    except PpclError as error:
        line = str(error)
        if "\n" in line or not line or len(line) > LINES:
            return "fault", f"{how}: a refusal of several lines, or none, or long: {line[:300]!r}"
        return "refused", how
    except AssertionError as error:
        return "fault", f"{how}: {error}" + ("" if error.args else traceback.format_exc(limit=-4))
    except _Late:
        return "fault", f"{how}: took more than {SECONDS} s: {traceback.format_exc(limit=-3)}"
    except Exception:  # noqa: BLE001 - that is what is looked for
        return "fault", f"{how}:\n{traceback.format_exc(limit=-6)}"


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield shutil.copytree(folder, Path(place) / "it")


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(signum: int, frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
