"""Where errors, signals and results leave the program: the one place that knows about exit codes and `--json`."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from typer import TyperException

from ppcl_fx.errors import PpclError, Stopped

INTERRUPTED = 130
TERMINATED = 143
USER_ERROR = 2
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CommandResult:
    """What a command found: `data` is the one object of `--json`, `lines` are what a person reads."""

    data: dict[str, Any]
    lines: list[str] = field(default_factory=list)


def guarded(run: Callable[[list[str]], object], argv: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    A `PpclError`, a wrong option and an `OSError` become one line on stderr and 2, Ctrl-C becomes 130, SIGTERM 143
    (after every open result was cleaned up). With `--json` among the arguments stdout gets exactly one object, the
    result or ``{"error": line}``, and everything else that is printed goes to stderr. Other exceptions are faults
    of this program and pass through with their traceback. `run` returns a `CommandResult`, an exit code or None.
    """
    arguments = list(argv)
    as_json = "--json" in arguments and "--help" not in arguments
    with _sigterm_unwinds(), _only_json(as_json) as stdout:

        def fail(line: str, code: int) -> int:
            print(f"ppcl-fx: {line}", file=sys.stderr)  # noqa: T201
            if as_json:
                _print_json({"error": line}, stdout)
            return code

        try:
            _check_arguments(arguments)
            outcome = run(arguments)
        except (PpclError, TyperException, OSError) as error:
            return fail(_line(error), error.code if isinstance(error, Stopped) else USER_ERROR)
        except KeyboardInterrupt:
            outcome = INTERRUPTED
        except Exception as error:
            if as_json:
                _print_json({"error": f"internal error: {type(error).__name__}: {error}"}, stdout)
            raise
        if isinstance(outcome, CommandResult):
            if as_json:
                _print_json(outcome.data, stdout)
            for line in () if as_json else outcome.lines:
                print(printable(line), file=stdout)
            return 0
        if outcome == INTERRUPTED:
            return fail("interrupted: nothing half-written was left", INTERRUPTED)
        return outcome if isinstance(outcome, int) else 0


def _print_json(data: dict[str, Any], stdout: TextIO) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # JSON's own escapes, which are the same to a program: half a character cannot be written as UTF-8.
    print(_HALVES.sub(lambda found: f"\\u{ord(found[0]):04x}", text), file=stdout, flush=True)


def printable(text: str) -> str:
    """Return one line for a terminal: whatever would move its cursor or cannot be written is shown as an escape."""
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode() for char in text
    )


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what no option has a use for: nothing, and bytes that are no text, which no result could hold."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if _HALVES.search(argument):
            raise PpclError(f"{argument}: holds bytes that are not UTF-8; give another name")
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if not value.strip() and (equals or not name):
            where = name or before
            raise PpclError(f"{where}: an empty value; give one, or leave {where} out" if where else "empty argument")


def _line(error: Exception) -> str:
    """The error in one line, with the way to the help where the command line itself was wrong."""
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        more = f" (see: {context.command_path} --help)" if context is not None else ""
        text = error.format_message() + more
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}; check the path, its permissions and the room left"
    else:
        text = str(error)
    return printable(" ".join(text.split()))


@contextmanager
def _only_json(as_json: bool) -> Iterator[TextIO]:
    """Yield the real stdout; with `as_json`, whatever else prints to stdout, C libraries included, gets stderr."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    original = sys.stdout
    # A captured stdout (a test's) is no longer file 1, and is written as it is.
    on_file_1 = original is sys.__stdout__
    stdout = os.fdopen(os.dup(kept), "w", encoding="utf-8") if on_file_1 else original
    try:
        with redirect_stdout(sys.stderr):
            yield stdout
    finally:
        stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        if on_file_1:
            stdout.close()


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise, so that half-written results are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
