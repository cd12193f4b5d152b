"""The data of a run: recorded calls, of which a share may be held out, or a source that makes its own.

Which calls a step trains on is a pure function of seed and step, so that resuming needs no iterator's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppcl_fx.calls.store import Call, Calls, check_finite, collate, hold_out, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.data.source import BadSamples, DataSource, DistributedSource, Feed, SampledSource
from ppcl_fx.train.distributed.batch_split import SplitBatch, cut, portion
from ppcl_fx.train.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel

FIRST = 64
"""Batches of a source that projectors are fitted on."""


class Batches(SampledSource):
    """Batches of calls, epoch after epoch; in one epoch each call is drawn exactly once. A `DataSource`.

    Only calls that concatenate to what a pipeline could have passed come together: the same shapes but for the batch
    dimension, the same resolution, the same constants. A group's last batch may hold fewer calls than `batch`. A call
    that holds NaN is left out of its batch, and the next good one comes instead where nothing is left of a batch.
    Raises PpclError where there are no calls.

    Tensors go to `device`, those of a call's main dtype as `dtype`, if it is given. Calls are drawn from the positions
    `only`, if they are given. With `split`, arguments are this rank's samples of a batch alone, as a `SplitBatch`.
    """

    def __init__(
        self,
        calls: Calls,
        batch: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        ranks: ProcessGroup | None = None,
        only: Sequence[int] | None = None,
        split: bool = False,
    ) -> None:
        self._all = range(len(calls)) if only is None else only
        if not len(self._all):
            raise PpclError("no calls to train on: record some prompts first")
        super().__init__(groups(calls, self._all), batch, seed)
        self._calls, self._split = calls, split
        self._place = torch.device(device), dtype
        self._ranks = ranks or ProcessGroup()
        self.skips = BadSamples("the recorded calls", len(self._all), self._ranks)

    @property
    def fingerprint(self) -> str:
        """The calls' fingerprint."""
        return self._calls.fingerprint

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step`, on the device. Raises PpclError where
        more than 1 % of the calls hold NaN or infinity.
        """
        return self.joined(self._drawn(step))

    def joined(self, calls: Sequence[Call]) -> dict[str, Any]:
        """Return the arguments of one call that does the work of these, or of this rank's samples, on the device."""
        if not self._split:
            return moved(collate(calls), *self._place)
        total = sum(call.batch for call in calls)
        first, last, counted = portion(total, self._ranks)
        return SplitBatch(moved(collate(cut(calls, first, last)), *self._place), counted, total)

    def one(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments of one call, by its position in `calls`, as `kwargs` gives those of a batch.
        Raises PpclError where the call holds NaN or infinity.
        """
        call = self._calls[index]
        _check(call)
        return moved(call.kwargs, *self._place)

    def each(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of the good calls one by one, in the order in which they were recorded."""
        for index in self._all:
            yield from (self.joined([call]) for call in self._good([index]))

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's recorded output for the batch of `step`, on the device and as recorded, or None
        where a call has none.
        """
        outputs = []
        for call in self._drawn(step):
            if call.output is None or call.output.shape[0] != call.batch:
                return None
            outputs.append(call.output)
        whole = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        first, last, _ = portion(len(whole), self._ranks) if self._split else (0, len(whole), 0)
        return whole[first:last].to(self._place[0])

    def samples(self, step: int) -> int:
        """Return the number of samples in the batch of `step`."""
        return sum(call.batch for call in self._drawn(step))

    def names(self, step: int) -> str:
        """Return the batch of `step` for a message: ``call 3``, ``calls 3, 7``."""
        return call_names(self._drawn(step))

    def _draw(self, step: int) -> list[Call]:
        """The good calls of a step; another one where all of them are bad, so that no batch is empty."""
        # The line of too many bad ones comes before none is left.
        return self._good(self.indices(step)) or next(found for i in self._all if (found := self._good([i])))

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


def call_names(calls: Sequence[Call]) -> str:
    """Return calls for a message: ``call 3``, ``calls 3, 7``."""
    return f"call{'s' if len(calls) > 1 else ''} {', '.join(str(call.index) for call in calls)}"


def _check(call: Call) -> None:
    map_tensors(call.kwargs, lambda path, tensor: check_finite(tensor, f"call {call.index}: {path!r}"))


def groups(calls: Calls, drawn: Sequence[int] | None = None) -> list[list[int]]:
    """Return the positions of the calls that may be joined, group by group; of some calls, or of all."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index in range(len(calls)) if drawn is None else drawn:
        found.setdefault(signature(calls[index]), []).append(index)
    return list(found.values())


def signature(call: Call) -> tuple[Any, ...]:
    """Return what two calls must share to be concatenated, hashable: all but the batch size and batched values."""
    return tuple((name, _mark(value, call.batch)) for name, value in sorted(call.kwargs.items()))


def _mark(value: Any, batch: int) -> Any:
    if isinstance(value, list) and len(value) == batch and not any(isinstance(item, Tensor) for item in value):
        # One number a sample (a text length) may differ from call to call as it does from sample to sample. What is
        # nested (an image's shape) says how the tokens are laid out, and must be the same for all.
        return ("each", frozenset("a number" if isinstance(item, int | float) else repr(item) for item in value))
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

    See `ppcl_fx.calls.store.hold_out`. Raises PpclError where a share is to be held out, and there are fewer than
    two calls.
    """
    if share == 0.0:
        return list(range(len(calls))), []
    if len(calls) < 2:
        raise PpclError("training option held_out: one call cannot be split; record more, or hold out none")
    held = hold_out(calls, share, seed)
    return sorted(set(range(len(calls))) - set(held)), held


def moved(kwargs: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return a call's arguments on `device`, tensors of their main dtype as `dtype` (as they are when None).

    The main dtype is that of the largest floating tensor, which the pipeline computed in; positions and timesteps may
    be wider, and stay so.
    """
    floating = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    main = max(floating, key=Tensor.numel).dtype if floating else None

    def move(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if dtype is not None and tensor.dtype == main else tensor.dtype)

    found: dict[str, Any] = map_tensors(dict(kwargs), move)
    return found


def spaced(positions: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of some positions, evenly spaced."""
    if count >= len(positions):
        return list(positions)
    return [positions[step * len(positions) // count] for step in range(count)]


class Data:
    """Gives each stage what it draws from: recorded calls, or a source.

    Raises PpclError where a share is to be held out of too few calls, or of a source; or a source is not for these
    ranks.
    """

    def __init__(self, data: Calls | DataSource, options: TrainConfig, ranks: ProcessGroup) -> None:
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
        elif isinstance(data, DistributedSource) and data.ranks.world != ranks.world:
            raise PpclError(
                f"the data was opened for {data.ranks.world} processes and {ranks.world} train on it; open it after "
                "they have come together"
            )
        elif not isinstance(data, DistributedSource) and not ranks.alone:
            raise PpclError(
                f"{type(data).__name__} gives its data to one process; train on one, or give it what "
                "ppcl_fx.train.data.source.DistributedSource has"
            )

    def feed(self, stage: str, model: PluggableModel) -> Feed:
        """Return what a stage trains on."""
        if isinstance(self._data, Calls):
            return self._batches(self._data, stage, model, self._used)
        if self._split(stage) and isinstance(self._data, DistributedSource):
            return self._data.split()
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
        options, ranks, split = self._options, self._ranks, self._split(stage)
        device, dtype = model.device, model.dtype
        return Batches(
            calls, options.batch, options.seed, device=device, dtype=dtype, ranks=ranks, only=only, split=split
        )

    def _split(self, stage: str) -> bool:
        """Whether each rank gets its share of a batch, and not all of it."""
        return stage == "finetune" and not self._ranks.alone
