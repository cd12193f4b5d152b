"""Errors meant for the person at the keyboard. The command line prints them in one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PpclError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do, in one line."""


class Stopped(PpclError):
    """Work was stopped by a signal and can go on later; `code` is the exit code that the signal asks for."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class GuardError(PpclError):
    """A call lies outside of what was traced; the message holds the guard's words."""


class Refusal(PpclError):
    """A pass cannot make an edit; the message names the edit, the reason and the nodes."""


def near(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
