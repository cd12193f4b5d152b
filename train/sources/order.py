"""In which order samples come: shuffled by seed and epoch, dealt out to ranks, a pure function of the step."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ppcl_fx.calls import Call
from ppcl_fx.errors import PpclError
from ppcl_fx.train.sources.source import State


class Order:
    """Batches of sample numbers, epoch after epoch; in one epoch each sample is drawn exactly once.

    A batch holds samples of one group only; a group's last batch may be smaller than `batch`. Ranks take batches in
    turn: at one step they hold different ones, and together they miss none. An epoch may end within a step.

    Args:
        groups: Numbers of the samples that may come together, group by group.
        batch: Samples of one rank's batch.
        seed: Decides the order together with the epoch's number.
        rank: Which of the processes this is.
        world: Number of processes.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        check_rank(rank, world)
        self._groups = groups
        self._batch = batch
        self._seed = seed
        self._rank, self._world = rank, world
        self._step, self._begin = 0, 0
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch, over all ranks."""
        return sum(-(-len(group) // self._batch) for group in self._groups)

    def indices(self, step: int) -> tuple[int, ...]:
        """Return the samples of this rank's batch of `step`."""
        return self.place(step)[1]

    def place(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Return the epoch (from 0) that this rank is in at `step`, and the samples of its batch."""
        epoch, position = divmod(self._number(step, self._rank), len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return epoch, self._epoch[1][position]

    def state(self, step: int) -> State:
        """Return where the ranks stand before `step`."""
        epoch, position = divmod(self._number(step, 0), len(self))
        return State(seed=self._seed, step=step, epoch=epoch, position=position)

    def restore(self, state: State) -> None:
        """Go on from a state that any number of ranks left.

        Raises:
            PpclError: The state is not one of this data.
        """
        if state["seed"] != self._seed or not 0 <= state["position"] < len(self):
            raise PpclError(
                f"the data stood at batch {state['position']} with seed {state['seed']}, and now has "
                f"{len(self)} batches and seed {self._seed}; train with the same data, batch and seed"
            )
        self._step, self._begin = state["step"], state["epoch"] * len(self) + state["position"]

    def _number(self, step: int, rank: int) -> int:
        """The number of a rank's batch of `step` in the one sequence of all epochs."""
        return self._begin + (step - self._step) * self._world + rank

    def _order(self, epoch: int) -> list[tuple[int, ...]]:
        generator = random.Random(f"ppcl-fx batches {self._seed} {epoch}")
        batches: list[tuple[int, ...]] = []
        for group in self._groups:
            shuffled = generator.sample(group, len(group))
            batches += [tuple(shuffled[i : i + self._batch]) for i in range(0, len(group), self._batch)]
        generator.shuffle(batches)
        return batches


class Ordered:
    """A source whose samples come in an `Order`; those of the step asked for last are at hand."""

    _order: Order

    def __init__(self) -> None:
        self._last: tuple[int, list[Call]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch, over all ranks."""
        return len(self._order)

    def state(self, step: int) -> State:
        """Return where the source stands before `step`."""
        return self._order.state(step)

    def restore(self, state: State) -> None:
        """Go on from `state`, on any number of ranks.

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


def check_rank(rank: int, world: int) -> None:
    """Check that `rank` is one of `world` processes.

    Raises:
        PpclError: It is not.
    """
    if not 0 <= rank < world:
        raise PpclError(f"rank {rank} of {world} processes; ranks are numbered from 0")
