"""The data of a run: recorded calls, of which a share may be held out, or a source that makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ppcl_fx.calls import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.data import Batches, split
from ppcl_fx.train.effects import spaced
from ppcl_fx.train.ranks import Ranks
from ppcl_fx.train.shares import SharedBatches
from ppcl_fx.train.sources.source import Feed, RankedSource, Source

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel

FIRST = 64
"""Batches of a source that projectors are fitted on."""


class Data:
    """Gives each stage what it draws from.

    Args:
        data: recorded calls, or a source.
        options: of the run.
        ranks: the processes that train together.

    Raises:
        PpclError: a share is to be held out of too few calls, or of a source; or a source is not for these ranks.
    """

    def __init__(self, data: Calls | Source, options: TrainConfig, ranks: Ranks) -> None:
        self._data, self._options, self._ranks = data, options, ranks
        self.fingerprint: str = data.fingerprint
        self._used: list[int] = []
        self._held: list[int] = []
        if isinstance(data, Calls):
            self._used, self._held = split(data, options.held_out, options.seed)
        elif options.held_out:
            raise PpclError("training option held_out: only recorded calls can be held out; give it no share")
        elif options.effects:
            raise PpclError("training option effects: measured on recorded calls only; leave it out")
        else:
            _check_ranks(data, ranks)

    @property
    def holds_out(self) -> bool:
        """Whether calls are held out."""
        return bool(self._held)

    def feed(self, stage: str, model: PluggableModel) -> Feed:
        """Return what a stage trains on."""
        if isinstance(self._data, Calls):
            return self._batches(self._data, stage, model, self._used)
        if self._split(stage) and isinstance(self._data, RankedSource):
            return self._data.shares()
        return self._data

    def each(self, model: PluggableModel) -> Iterator[dict[str, Any]]:
        """Yield the arguments of every recorded call to train on, one by one, or of a source's first batches."""
        if isinstance(self._data, Calls):
            yield from self._batches(self._data, "width", model, self._used).each()
        else:
            yield from (self._data.kwargs(step) for step in range(FIRST))

    def held_out(self, stage: str, model: PluggableModel) -> Batches | None:
        """Return what a stage is evaluated on, None without held-out calls."""
        if not isinstance(self._data, Calls) or not self._held:
            return None
        return self._batches(self._data, stage, model, self._held)

    def measured_on(self, count: int) -> tuple[Calls, list[int]]:
        """Return the recorded calls and at most `count` positions in them, of held-out ones where there are any."""
        assert isinstance(self._data, Calls)
        return self._data, spaced(self._held or self._used, count)

    def _batches(self, calls: Calls, stage: str, model: PluggableModel, only: list[int]) -> Batches:
        options = self._options
        where: dict[str, Any] = {
            "device": model.device, "dtype": model.dtype, "only": only, "ranks": self._ranks,
        }  # fmt: skip
        kind = SharedBatches if self._split(stage) else Batches
        return kind(calls, options.batch, options.seed, **where)

    def _split(self, stage: str) -> bool:
        """Whether each rank gets its share of a batch, and not all of it."""
        return stage == "finetune" and not self._ranks.alone


def _check_ranks(data: Source, ranks: Ranks) -> None:
    """Raise PpclError where a source cannot give its data to these ranks."""
    if isinstance(data, RankedSource):
        if data.ranks.world != ranks.world:
            raise PpclError(
                f"the data was opened for {data.ranks.world} processes and {ranks.world} train on it; open it after "
                "they have come together"
            )
    elif not ranks.alone:
        raise PpclError(
            f"{type(data).__name__} gives its data to one process; train on one, or give it what "
            "ppcl_fx.train.sources.source.RankedSource has"
        )
