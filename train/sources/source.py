"""What the training loop asks of its data."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class State(TypedDict):
    """Where a source stands, small enough for every checkpoint.

    Attributes:
        seed: What decides the order.
        step: Steps that are done, of each rank.
        epoch: Epochs that are done, of all ranks together.
        position: What of the current epoch is done, of all ranks together: batches, or parts for prompts.
    """

    seed: int
    step: int
    epoch: int
    position: int


class Feed(Protocol):
    """What a step draws from: batches by number, the same ones whenever they are asked for."""

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of this rank's batch of `step` (from 0), on the device.

        Raises:
            PpclError: More than 1 % of the samples are corrupt.
        """
        ...

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's recorded output for that batch, or None where it is not known."""
        ...

    def samples(self, step: int) -> int:
        """Return the number of samples in that batch."""
        ...

    def names(self, step: int) -> str:
        """Return what that batch is made of, for a message."""
        ...


@runtime_checkable
class Source(Feed, Protocol):
    """Data for training: a pure function of the step.

    Going on after a kill is asking for the same step again. `state` and `restore` are needed only when the number
    of ranks changes in between.
    """

    @property
    def fingerprint(self) -> str:
        """The hash (sha256) of what the numbers depend on; a run that goes on must find the same one."""
        ...

    def state(self, step: int) -> State:
        """Return where the source stands before `step`."""
        ...

    def restore(self, state: State) -> None:
        """Go on from `state`, on any number of ranks: ``kwargs(state["step"])`` is what comes next.

        Raises:
            PpclError: The state belongs to another seed or to other data.
        """
        ...
