"""Corrupt samples: skipped, counted and named, until there are too many."""

from __future__ import annotations

import logging

from ppcl_fx.errors import PpclError

LIMIT = 0.01
"""The share of samples that may be corrupt."""
_log = logging.getLogger("ppcl_fx.train")


class Skips:
    """The corrupt samples of one data set.

    Args:
        where: The data, for messages.
        total: Samples in all.

    Attributes:
        reasons: What is wrong with each corrupt sample, by its name.
    """

    def __init__(self, where: str, total: int) -> None:
        self.where = where
        self.total = total
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Count a corrupt sample, once however often it is met, and name it in the log.

        Raises:
            PpclError: More than 1 % of all samples are corrupt.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        _log.warning("%s: %s is skipped (%s); %d corrupt so far", self.where, name, reason, len(self.reasons))
        if len(self.reasons) > LIMIT * self.total:
            raise PpclError(
                f"{self.where}: {len(self.reasons)} of {self.total} samples are corrupt, which is more than 1 %; "
                f"the last is {name}: {reason}; mend or remove them"
            )
