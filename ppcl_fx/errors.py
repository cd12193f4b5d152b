"""Errors meant for the person at the keyboard. The command line prints them in one line and exits with code 2."""

from __future__ import annotations

import difflib
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

    Attributes:
        option: its name; empty where several are at odds.
        reason: why.
        part: the entry of a list that is wrong; empty where it is the whole.
    """

    def __init__(self, option: str, reason: str, part: str = "") -> None:
        super().__init__(f"option {option}: {reason}" if option else reason)
        self.option, self.reason, self.part = option, reason, part


class GuardError(PpclError):
    """A call lies outside of what was traced; the message holds the guard's words."""


class Refusal(PpclError):
    """A pass cannot make an edit; the message names the edit, the reason and the nodes."""


def near(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


@contextmanager
def foreign(what: str, advice: str) -> Iterator[None]:
    """Tell in one line what another library raises on data from outside; it may be an exception of any kind.

    What this package raises itself passes through: its own broken invariants stay loud.

    Args:
        what: the file or model, and what cannot be done with it.
        advice: what the user can do.

    Raises:
        PpclError: the block raised in code that is not this package's.
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
    names: list[str] = []
    step = error.__traceback__
    while step is not None:
        names.append(str(step.tb_frame.f_globals.get("__name__")))
        step = step.tb_next
    while names and names[-1] == _STAND_IN:
        names.pop()
    name = names[-1] if names else ""
    # The classes of `shapes` are built from files as those of any library are.
    return name.partition(".")[0] == "ppcl_fx" and not name.startswith("ppcl_fx.shapes.")
