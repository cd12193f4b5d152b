"""Which recorded calls a step trains on: a pure function of seed and step, so that resuming needs no
iterator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppcl_fx.calls import Call, Calls, check_finite, collate, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.fingerprint import tensor_digest
from ppcl_fx.train.sources.order import Order
from ppcl_fx.train.sources.skips import Skips
from ppcl_fx.train.sources.source import State


class Batches:
    """Batches of calls, epoch after epoch; in one epoch each call is drawn exactly once. A `Source`.

    Only calls that concatenate to what a pipeline could have passed come together: the same shapes but for
    the batch dimension, the same resolution, the same constants. A group's last batch may hold fewer calls
    than `batch`. A call that holds NaN is left out of its batch, and the next good one comes instead where
    nothing is left of a batch.

    Args:
        calls: The recorded calls.
        batch: Calls (each with its own batch of samples) for one step.
        seed: Decides the order together with the epoch's number.
        device: Where the tensors go.
        dtype: What the floating tensors of the calls' main dtype become (the model's own dtype); None leaves
            them.
        rank: Which of the processes this is; each gets its own batches, together they get all.
        world: Number of processes.

    Raises:
        PpclError: There are no calls.
    """

    def __init__(
        self,
        calls: Calls,
        batch: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(calls):
            raise PpclError("no calls to train on: record some prompts first")
        self._calls = calls
        self._device = torch.device(device)
        self._dtype = dtype
        self._order = Order(groups(calls), batch, seed, rank, world)
        self.skips = Skips("the recorded calls", len(calls))

    @property
    def fingerprint(self) -> str:
        """The calls' fingerprint."""
        return self._calls.fingerprint

    def __len__(self) -> int:
        """Return the number of batches in an epoch, over all ranks."""
        return len(self._order)

    def indices(self, step: int) -> tuple[int, ...]:
        """Return the positions in `calls` of the batch of `step` (from 0)."""
        return self._order.indices(step)

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step`, on the device.

        Raises:
            PpclError: More than 1 % of the calls hold NaN or infinity.
        """
        drawn = self._good(self.indices(step))
        if not drawn:
            # Another good call, so that every rank has work; the line of too many bad ones comes before none is left.
            drawn = next(found for i in range(len(self._calls)) if (found := self._good([i])))
        return moved(collate(drawn), self._device, self._dtype)

    def state(self, step: int) -> State:
        """Return where the source stands before `step`."""
        return self._order.state(step)

    def restore(self, state: State) -> None:
        """Go on from `state`, on any number of ranks.

        Raises:
            PpclError: The state belongs to other data.
        """
        self._order.restore(state)

    def _good(self, indices: Sequence[int]) -> list[Call]:
        good = []
        for index in indices:
            call = self._calls[index]
            try:
                _check(call)
            except PpclError as error:
                self.skips.add(f"call {call.index}", str(error))
            else:
                good.append(call)
        return good


def _check(call: Call) -> None:
    def check(path: str, tensor: Tensor) -> None:
        check_finite(tensor, f"call {call.index}: {path!r}")

    for name, value in call.kwargs.items():
        map_tensors(value, check, name)


def groups(calls: Calls) -> list[list[int]]:
    """Return the positions of the calls that may be joined, group by group."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index in range(len(calls)):
        found.setdefault(signature(calls[index]), []).append(index)
    return list(found.values())


def signature(call: Call) -> tuple[Any, ...]:
    """Return what two calls must share to be concatenated: a hashable digest of all but batch size and
    batched values.
    """
    return tuple((name, _mark(value, call.batch)) for name, value in sorted(call.kwargs.items()))


def _mark(value: Any, batch: int) -> Any:
    if (
        isinstance(value, list)
        and len(value) == batch
        and not any(isinstance(item, Tensor) for item in value)
    ):
        # One number a sample (a text length) may differ from call to call as it does from sample to sample.
        # What is
        # nested (an image's shape) says how the tokens are laid out, and must be the same for all.
        return (
            "each",
            frozenset("a number" if isinstance(item, int | float) else repr(item) for item in value),
        )
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == batch:
            return ("batched", str(value.dtype), tuple(value.shape[1:]))
        return ("shared", tensor_digest(value))
    if isinstance(value, dict):
        return tuple((name, _mark(item, batch)) for name, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_mark(item, batch) for item in value)
    return repr(value)


def moved(kwargs: dict[str, Any], device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a call's arguments on `device`, tensors of their main dtype as `dtype` (as they are when None)."""
    main = _main_dtype(kwargs)

    def move(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if dtype is not None and tensor.dtype == main else tensor.dtype)

    return {name: map_tensors(value, move, name) for name, value in kwargs.items()}


def _main_dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the largest floating tensor: what the pipeline computed in.

    Positions and timesteps may be wider, and stay so.
    """
    floating = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return max(floating, key=Tensor.numel).dtype if floating else None
