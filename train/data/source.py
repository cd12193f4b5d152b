"""What the training loop asks of its data, and the order of samples: a pure function of the step, without bad ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from ppcl_fx.calls.store import Call
from ppcl_fx.errors import PpclError
from ppcl_fx.train.distributed.process_group import ALONE, ProcessGroup

LIMIT = 0.01  # the share of samples that may be corrupt
_log = logging.getLogger("ppcl_fx.train")


class SourceState(TypedDict):
    """Where a source stands before `step`, to the sample; the same whatever the number of ranks."""

    seed: int  # decides the order
    step: int
    epoch: int
    position: int  # what of the current epoch is done: batches, or parts for prompts
    within: int  # batches that are done of the part that was begun; 0 where there are no parts


class Feed(Protocol):
    """What a step draws from: batches by number, the same ones whenever they are asked for."""

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step` (from 0), on the device. Raises PpclError
        where more than 1 % of the samples are corrupt.
        """

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's recorded output for that batch, or None where it is not known."""

    def samples(self, step: int) -> int:
        """Return the number of samples in that batch."""

    def names(self, step: int) -> str:
        """Return what that batch is made of, for a message."""


@runtime_checkable
class DataSource(Feed, Protocol):
    """Data for training: a pure function of the step.

    Going on after a kill is asking for the same step again; `state` and `restore` save a source the way there.
    """

    @property
    def fingerprint(self) -> str:
        """The hash (sha256) of what the numbers depend on; a run that goes on must find the same one."""

    def state(self, step: int) -> SourceState:
        """Return where the source stands before `step`."""

    def restore(self, state: SourceState) -> None:
        """Go on from `state`: ``kwargs(state["step"])`` is what comes next. Raises PpclError where it belongs to
        another seed or to other data.
        """


@runtime_checkable
class DistributedSource(DataSource, Protocol):
    """A source for several ranks: they share the work of making the data, and all draw the same batches.

    Ranks may wait for each other in every method, so all of them ask for the same in the same order.
    """

    @property
    def ranks(self) -> ProcessGroup:
        """This process among the others."""

    def split(self) -> Feed:
        """Return the same batches as `ppcl_fx.train.distributed.batch_split.SplitBatch`: this rank's samples."""


class Sampler:
    """Batches of sample numbers, epoch after epoch; in one epoch each sample is drawn exactly once.

    A batch holds samples of one group only; a group's last batch may be smaller than `batch`. The seed and the epoch
    decide the order. How many processes train does not count.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch: int, seed: int) -> None:
        self._groups, self._batch, self._seed = groups, batch, seed
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return sum(-(-len(group) // self._batch) for group in self._groups)

    def indices(self, step: int) -> tuple[int, ...]:
        """Return the samples of the batch of `step` (from 0)."""
        return self.place(step)[1]

    def place(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Return the epoch (from 0) of `step`, and the samples of its batch."""
        epoch, position = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return epoch, self._epoch[1][position]

    def state(self, step: int) -> SourceState:
        """Return where the data stands before `step`."""
        epoch, position = divmod(step, len(self))
        return SourceState(seed=self._seed, step=step, epoch=epoch, position=position, within=0)

    def restore(self, state: SourceState) -> None:
        """Raise PpclError unless a state, which any number of ranks left, is one of this data: no more is needed."""
        if state != self.state(state["step"]):
            raise PpclError(
                f"the data stood at batch {state['position']} of epoch {state['epoch']} with seed {state['seed']}, and "
                f"now has {len(self)} batches an epoch and seed {self._seed}; train with the same data, batch and seed"
            )

    def _order(self, epoch: int) -> list[tuple[int, ...]]:
        generator = random.Random(f"ppcl-fx batches {self._seed} {epoch}")
        batches: list[tuple[int, ...]] = []
        for group in self._groups:
            shuffled = generator.sample(group, len(group))
            batches += [tuple(shuffled[i : i + self._batch]) for i in range(0, len(group), self._batch)]
        generator.shuffle(batches)
        return batches


class SampledSource(Sampler):
    """A source whose samples come in this order; those of the step asked for last are at hand."""

    _last: tuple[int, list[Call]] = (-1, [])

    def _drawn(self, step: int) -> list[Call]:
        if self._last[0] != step:
            self._last = (step, self._draw(step))
        return self._last[1]

    def _draw(self, step: int) -> list[Call]:
        raise NotImplementedError


class BadSamples:
    """The corrupt samples of a data set of `total`, by name with the reason: the same ones on all ranks."""

    def __init__(self, where: str, total: int, ranks: ProcessGroup = ALONE) -> None:
        self.where, self.total, self._ranks = where, total, ranks
        self.reasons: dict[str, str] = {}
        self._met: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Count a corrupt sample that every rank knows of, once however often it is met, and name it in the log. Raises
        PpclError where more than 1 % of all samples are corrupt.
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
        """Count what the ranks, which all call this together, have met; return whether it was anything. Raises
        PpclError as `add`, in the same words on every rank.
        """
        if not self._ranks.any(bool(self._met)):
            return False
        met, self._met = self._ranks.gather(self._met), {}
        for each in met:
            for name, reason in each.items():
                self.add(name, reason)
        return True
