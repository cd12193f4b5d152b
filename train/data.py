"""Which recorded calls a step trains on: a pure function of seed and step, so that resuming needs no
iterator's state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ppcl_fx.calls import Call, Calls, check_finite, collate, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.fingerprint import tensor_digest


class Feed(Protocol):
    """What training draws from: batches by number, the same ones whenever they are asked for."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of batch number `step` (from 0), on the device."""

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's recorded output for that batch, or None where it is not known."""

    def samples(self, step: int) -> int:
        """Return the number of samples in that batch."""

    def names(self, step: int) -> str:
        """Return what that batch is made of, for a message."""


class Batches:
    """Batches of calls, epoch after epoch; in one epoch each call is drawn exactly once.

    Only calls that concatenate to what a pipeline could have passed come together: the same shapes but for
    the batch dimension, the same resolution, the same constants. A group's last batch may hold fewer calls
    than `batch`.

    Args:
        calls: The recorded calls.
        batch: Calls (each with its own batch of samples) for one step.
        seed: Decides the order together with the epoch's number.
        device: Where the tensors go.
        dtype: What the floating tensors of the calls' main dtype become (the model's own dtype); None leaves
            them.
        only: The positions in `calls` to draw from; None for all.

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
        only: Sequence[int] | None = None,
    ) -> None:
        drawn = range(len(calls)) if only is None else only
        if not len(drawn):
            raise PpclError("no calls to train on: record some prompts first")
        self._calls = calls
        self._seed = seed
        self._batch = batch
        self._device = torch.device(device)
        self._dtype = dtype
        self._groups = _groups(calls, drawn)
        self._epoch: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return sum(-(-len(group) // self._batch) for group in self._groups)

    def indices(self, step: int) -> tuple[int, ...]:
        """Return the positions in `calls` of the batch of `step` (from 0)."""
        epoch, position = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][position]

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step`, on the device.

        Raises:
            PpclError: A call holds NaN or infinity.
        """
        drawn = [self._calls[index] for index in self.indices(step)]
        for call in drawn:
            _check(call)
        return self.joined(drawn)

    def joined(self, calls: Sequence[Call]) -> dict[str, Any]:
        """Return the arguments of one call that does the work of these, on the device."""
        return _moved(collate(calls), self._device, self._dtype)

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's recorded output for the batch of `step`, on the device and as recorded, or None
        where a call has none.
        """
        outputs = []
        for index in self.indices(step):
            call = self._calls[index]
            if call.output is None or call.output.shape[0] != call.batch:
                return None
            outputs.append(call.output)
        return torch.cat(outputs).to(self._device) if len(outputs) > 1 else outputs[0].to(self._device)

    def samples(self, step: int) -> int:
        """Return the number of samples in the batch of `step`."""
        return sum(self._calls[index].batch for index in self.indices(step))

    def names(self, step: int) -> str:
        """Return the batch of `step` for a message: ``call 3``, ``calls 3, 7``."""
        numbers = [str(self._calls[index].index) for index in self.indices(step)]
        return f"call{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"

    def _order(self, epoch: int) -> list[tuple[int, ...]]:
        generator = random.Random(f"ppcl-fx batches {self._seed} {epoch}")
        batches: list[tuple[int, ...]] = []
        for group in self._groups:
            shuffled = generator.sample(group, len(group))
            batches += [tuple(shuffled[i : i + self._batch]) for i in range(0, len(group), self._batch)]
        generator.shuffle(batches)
        return batches


def _check(call: Call) -> None:
    def check(path: str, tensor: Tensor) -> None:
        check_finite(tensor, f"call {call.index}: {path!r}")

    for name, value in call.kwargs.items():
        map_tensors(value, check, name)


def _groups(calls: Calls, drawn: Sequence[int]) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in drawn:
        groups.setdefault(signature(calls[index]), []).append(index)
    return list(groups.values())


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


def split(calls: Calls, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the positions of the calls to train on and of those to hold out, each in order.

    A function of the calls, the share and the seed alone. Calls of the same prompts stay on one side where there
    are prompts enough: what they share would make the held-out loss too good.

    Raises:
        PpclError: A share is to be held out, and there are fewer than two calls.
    """
    if share == 0.0:
        return list(range(len(calls))), []
    if len(calls) < 2:
        raise PpclError("training option held_out: one call cannot be split; record more, or hold out none")
    together: dict[Any, list[int]] = {}
    for index in range(len(calls)):
        together.setdefault(calls[index].prompts, []).append(index)
    if len(together) * share < 1:
        together = {index: [index] for index in range(len(calls))}
    parts = random.Random(f"ppcl-fx held out {seed}").sample(list(together.values()), len(together))
    count = min(len(parts) - 1, max(1, round(len(parts) * share)))
    held = sorted(index for part in parts[:count] for index in part)
    return sorted(set(range(len(calls))) - set(held)), held


def _moved(kwargs: dict[str, Any], device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
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
