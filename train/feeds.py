"""The data of a run: recorded calls, of which a share may be held out, or a source that makes its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppcl_fx.calls import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.train.data import Batches, split
from ppcl_fx.train.effects import spaced
from ppcl_fx.train.options import Options
from ppcl_fx.train.ranks import Ranks
from ppcl_fx.train.shares import SharedBatches
from ppcl_fx.train.sources.source import Feed, Source

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel


class Data:
    """Gives each stage what it draws from.

    Args:
        data: recorded calls, or a source.
        options: of the run.
        ranks: the processes that train together.

    Raises:
        PpclError: a share is to be held out of too few calls, or of a source; or a source is shared by ranks.
    """

    def __init__(self, data: Calls | Source, options: Options, ranks: Ranks) -> None:
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
        elif not ranks.alone:
            raise PpclError("several processes train on recorded calls only; record the prompts first")

    @property
    def holds_out(self) -> bool:
        """Whether calls are held out."""
        return bool(self._held)

    def feed(self, stage: str, model: PluggableModel) -> Feed:
        """Return what a stage trains on."""
        if isinstance(self._data, Calls):
            return self._batches(self._data, stage, model, self._used)
        return self._data

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
        where: dict[str, Any] = {"device": model.device, "dtype": model.dtype, "only": only}
        if stage == "finetune" and not self._ranks.alone:
            return SharedBatches(calls, options.batch, options.seed, ranks=self._ranks, **where)
        return Batches(calls, options.batch, options.seed, **where)
