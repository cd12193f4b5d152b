"""What the training loop asks of its data."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from ppcl_fx.train.distributed.process_group import ProcessGroup


class SourceState(TypedDict):
    """Where a source stands, to the sample; the same whatever the number of ranks.

    Attributes:
        seed: What decides the order.
        step: Steps that are done.
        epoch: Epochs that are done.
        position: What of the current epoch is done: batches, or parts for prompts.
        within: Batches that are done of the part that was begun; 0 where there are no parts.
    """

    seed: int
    step: int
    epoch: int
    position: int
    within: int


class Feed(Protocol):
    """What a step draws from: batches by number, the same ones whenever they are asked for."""

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step` (from 0), on the device.

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
class DataSource(Feed, Protocol):
    """Data for training: a pure function of the step.

    Going on after a kill is asking for the same step again; `state` and `restore` save a source the way there.
    """

    @property
    def fingerprint(self) -> str:
        """The hash (sha256) of what the numbers depend on; a run that goes on must find the same one."""
        ...

    def state(self, step: int) -> SourceState:
        """Return where the source stands before `step`."""
        ...

    def restore(self, state: SourceState) -> None:
        """Go on from `state`: ``kwargs(state["step"])`` is what comes next.

        Raises:
            PpclError: The state belongs to another seed or to other data.
        """
        ...


@runtime_checkable
class DistributedSource(DataSource, Protocol):
    """A source for several ranks: they share the work of making the data, and all draw the same batches.

    Ranks may wait for each other in every method, so all of them ask for the same in the same order.
    """

    @property
    def ranks(self) -> ProcessGroup:
        """This process among the others."""
        ...

    def split(self) -> Feed:
        """Return the same batches as `ppcl_fx.train.distributed.batch_split.SplitBatch`: this rank's samples."""
        ...
