"""Errors meant for the person at the keyboard. The command line prints them in one line and exits with code 2."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 1000
"""Characters of a message. A name that a damaged file gives may be of any length."""


class PpclError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        long = len(message) > LONGEST
        super().__init__(f"{message[: LONGEST - 304]} ... {message[-299:]}" if long else message)


class Stopped(PpclError):
    """Work was stopped by a signal and can go on later; `code` is the exit code that the signal asks for."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class OptionError(PpclError):
    """A value that an options model does not take.

    `option` is empty where several are at odds; `part` is the wrong entry of a list, empty where it is the whole.
    """

    def __init__(self, option: str, reason: str, part: str = "") -> None:
        super().__init__(f"option {option}: {reason}" if option else reason)
        self.option, self.reason, self.part = option, reason, part


class GuardError(PpclError):
    """A call lies outside of what was traced; the message holds the guard's words."""


class ValuesNeeded(PpclError):
    """A model looks at a tensor's values to decide what to compute, and is traced without them."""


class Refusal(PpclError):
    """A pass cannot make an edit; the message names the edit, the reason and the nodes."""


def near(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


@contextmanager
def foreign(what: str, advice: str) -> Iterator[None]:
    """Raise what another library raises on data from outside as one line: `what` cannot be done, why, and `advice`.

    What this package raises itself passes through: its own broken invariants stay loud.
    """
    try:
        yield
    except PpclError:
        raise
    except Exception as error:
        if _ours(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PpclError(f"{what} ({reason}); {advice}") from error


_STAND_IN = "ppcl_fx.tracing.proxies"
"""What a proxy raises, such as the AttributeError of its example, is about the line that asked it."""


def _ours(error: Exception) -> bool:
    """Tell whether an exception was raised by a line of this package."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [str(frame.f_globals.get("__name__")) for frame in frames]
    name = next((name for name in reversed(names) if name != _STAND_IN), "")
    # The classes of `shapes` are built from files as those of any library are.
    return name.partition(".")[0] == "ppcl_fx" and not name.startswith("ppcl_fx.shapes.")
