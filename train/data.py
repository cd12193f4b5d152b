"""Which recorded calls a step trains on: a pure function of seed and step, so that resuming needs no
iterator's state.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ppcl_fx.calls import Call, Calls, check_finite, collate, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.fingerprint import tensor_digest


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
    ) -> None:
        if not len(calls):
            raise PpclError("no calls to train on: record some prompts first")
        self._calls = calls
        self._seed = seed
        self._batch = batch
        self._device = torch.device(device)
        self._dtype = dtype
        self._groups = _groups(calls)
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
        return _moved(collate(drawn), self._device, self._dtype)

    def one(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments of one call, by its position in `calls`, as `kwargs` gives those of a batch.

        Raises:
            PpclError: The call holds NaN or infinity.
        """
        call = self._calls[index]
        _check(call)
        return _moved(call.kwargs, self._device, self._dtype)

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


def _groups(calls: Calls) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in range(len(calls)):
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
