"""Where errors, signals and results leave the program: the one place that knows about exit codes and `--json`."""

from __future__ import annotations

import json
import os
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


@dataclass(frozen=True)
class Result:
    """What a command found: `data` is the one object of `--json`, `lines` are what a person reads."""

    data: dict[str, Any]
    lines: list[str] = field(default_factory=list)


def guarded(run: Callable[[list[str]], object], argv: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    A `PpclError`, a wrong option and an `OSError` become one line on stderr and 2, Ctrl-C becomes 130, SIGTERM 143
    (after every open result was cleaned up). With `--json` among the arguments stdout gets exactly one object, the
    result or ``{"error": line}``, and everything else that is printed goes to stderr. Other exceptions are faults
    of this program and pass through with their traceback.

    Args:
        run: the parsed program; returns a `Result`, an exit code or None.
        argv: the arguments, without the program's name.
    """
    arguments = list(argv)
    as_json = "--json" in arguments and "--help" not in arguments
    with _sigterm_unwinds(), _only_json(as_json) as stdout:
        try:
            outcome = run(arguments)
        except Stopped as error:
            return _fail(_line(error), error.code, stdout if as_json else None)
        except (PpclError, TyperException, OSError) as error:
            return _fail(_line(error), USER_ERROR, stdout if as_json else None)
        except KeyboardInterrupt:
            outcome = INTERRUPTED
        except Exception as error:
            if as_json:
                _print_json({"error": f"internal error: {type(error).__name__}: {error}"}, stdout)
            raise
        if isinstance(outcome, Result):
            _show(outcome, as_json, stdout)
            return 0
        code = outcome if isinstance(outcome, int) else 0
        if code == INTERRUPTED:
            return _fail("interrupted: nothing half-written was left", code, stdout if as_json else None)
        return code


def _show(result: Result, as_json: bool, stdout: TextIO) -> None:
    if as_json:
        _print_json(result.data, stdout)
        return
    for line in result.lines:
        print(line, file=stdout)


def _fail(line: str, code: int, stdout: TextIO | None) -> int:
    print(f"ppcl-fx: {line}", file=sys.stderr)  # noqa: T201
    if stdout is not None:
        _print_json({"error": line}, stdout)
    return code


def _print_json(data: dict[str, Any], stdout: TextIO) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), file=stdout, flush=True)


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
    return " ".join(text.split())


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
