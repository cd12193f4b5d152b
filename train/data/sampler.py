"""In which order samples come: shuffled by seed and epoch, a pure function of the step."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ppcl_fx.calls.store import Call
from ppcl_fx.errors import PpclError
from ppcl_fx.train.data.source import SourceState


class Sampler:
    """Batches of sample numbers, epoch after epoch; in one epoch each sample is drawn exactly once.

    A batch holds samples of one group only; a group's last batch may be smaller than `batch`. How many processes train
    does not count.

    Args:
        groups: Numbers of the samples that may come together, group by group.
        batch: Samples of one batch.
        seed: Decides the order together with the epoch's number.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch: int, seed: int) -> None:
        self._groups = groups
        self._batch = batch
        self._seed = seed
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return sum(-(-len(group) // self._batch) for group in self._groups)

    def indices(self, step: int) -> tuple[int, ...]:
        """Return the samples of the batch of `step`."""
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
        """Check that a state is one of this data; nothing else is needed to go on from it.

        Raises:
            PpclError: The state is not one of this data.
        """
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


class SampledSource:
    """A source whose samples come in an `Sampler`; those of the step asked for last are at hand."""

    _order: Sampler

    def __init__(self) -> None:
        self._last: tuple[int, list[Call]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._order)

    def state(self, step: int) -> SourceState:
        """Return where the source stands before `step`."""
        return self._order.state(step)

    def restore(self, state: SourceState) -> None:
        """Go on from `state`, which any number of ranks left.

        Raises:
            PpclError: The state belongs to other data.
        """
        self._order.restore(state)
        self._last = (-1, [])

    def _drawn(self, step: int) -> list[Call]:
        """The calls of a step's samples."""
        if self._last[0] != step:
            self._last = (step, self._draw(step))
        return self._last[1]

    def _draw(self, step: int) -> list[Call]:
        raise NotImplementedError
