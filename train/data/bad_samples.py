"""Corrupt samples: skipped, counted and named, until there are too many."""

from __future__ import annotations

import logging

from ppcl_fx.errors import PpclError
from ppcl_fx.train.distributed.process_group import ProcessGroup

LIMIT = 0.01
"""The share of samples that may be corrupt."""
_log = logging.getLogger("ppcl_fx.train")


class BadSamples:
    """The corrupt samples of one data set: the same ones on all ranks, named by the first.

    Args:
        where: The data, for messages.
        total: Samples in all.
        ranks: This process among the others; None for one process.

    Attributes:
        reasons: What is wrong with each corrupt sample, by its name.
    """

    def __init__(self, where: str, total: int, ranks: ProcessGroup | None = None) -> None:
        self.where = where
        self.total = total
        self.reasons: dict[str, str] = {}
        self._ranks = ranks or ProcessGroup()
        self._met: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Count a corrupt sample that every rank knows of, once however often it is met, and name it in the log.

        Raises:
            PpclError: More than 1 % of all samples are corrupt.
        """
        if name in self.reasons:
            return
        self.reasons[name] = reason
        if self._ranks.first:
            _log.warning("%s: %s is skipped (%s); %d corrupt so far", self.where, name, reason, len(self.reasons))
        if len(self.reasons) > LIMIT * self.total:
            raise PpclError(
                f"{self.where}: {len(self.reasons)} of {self.total} samples are corrupt, which is more than 1 %; "
                f"the last is {name}: {reason}; mend or remove them"
            )

    def meet(self, name: str, reason: str) -> None:
        """Note a corrupt sample that the other ranks may not know of; it counts from the next `agree` on."""
        if name not in self.reasons:
            self._met[name] = reason

    def agree(self) -> bool:
        """Count what the ranks have met, on all of them and in the same order; return whether it was anything.

        All ranks call this at the same points.

        Raises:
            PpclError: More than 1 % of all samples are corrupt, in the same words on every rank. Or a rank is lost.
        """
        if not self._ranks.any(bool(self._met)):
            return False
        met, self._met = self._ranks.gather(self._met), {}
        for each in met:
            for name, reason in each.items():
                self.add(name, reason)
        return True
