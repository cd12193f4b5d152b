"""Prompts: the teacher makes its own training data while training goes on.

A run of the pipeline draws `batch_size` prompts with seeds of its own, so who draws it, and when, changes no number.
``FOLDER/<fingerprint>/part-00000.runs/000/`` holds a run while its part is not whole; ``part-00000/`` is a whole part.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ppcl_fx.calls.record import record
from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, inside, new_folder, read_json, write_json
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.train.core.batches import Batches, groups
from ppcl_fx.train.data.source import SourceState
from ppcl_fx.train.distributed.process_group import Place, current, wait_for

CALLS, CARD = "calls", "part.json"  # what the folder of a part holds


class _Card(Record):
    """What is known of a recorded part without its tensors: how many calls may come together, group by group."""

    version: Literal[1] = 1
    groups: list[int]


@dataclass(frozen=True)
class Recording:
    """How prompts are recorded."""

    part: int = 8  # prompts that are recorded at a time
    batch_size: int = 1  # prompts in one run of the pipeline, and samples in one call
    model: str | None = None  # the teacher's fingerprint; None: that of the pipeline's transformer now
    told: Callable[[int], None] | None = None  # called with the number of a part before it is recorded
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of `ppcl_fx.record`


class PromptSource:
    """Calls that the teacher's pipeline makes while it draws prompts. A `DistributedSource`.

    The prompts are shuffled once and cut into parts. A part is recorded when training comes to it, saved, and trained
    on for as many steps as its calls fill. Later epochs go through the saved parts, each time in another order. Ranks
    divide the runs for a part, and then all train on the whole of it, so all of them ask for the same part at the same
    time. A kill costs each rank one run of the pipeline at most. Only one part is in memory.

    The pipeline is any of diffusers with a `transformer`, which must compute the teacher's output whenever `kwargs` is
    called. Prompt number i of all starts from noise of the seed ``seed + i``.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        folder: str | Path,  # of the recorded parts; on a disk that all ranks see
        batch: int,  # calls for one step
        seed: int,  # decides the parts, their order and the noise
        place: Place | None = None,
        recording: Recording | None = None,
    ) -> None:
        place, how = place or Place(), recording or Recording()
        if not prompts:
            raise PpclError("there are no prompts to train on; give a file with one prompt a line")
        if how.part < 1 or how.batch_size < 1:
            raise PpclError(f"{min(how.part, how.batch_size)} prompts at a time are too few; use 1 or more")
        shuffled = random.Random(f"ppcl-fx prompts {seed}").sample(list(prompts), len(prompts))
        self._pipeline, self._parts = pipeline, [shuffled[i : i + how.part] for i in range(0, len(shuffled), how.part)]
        self._batch, self._seed, self._device, self._dtype = batch, seed, torch.device(place.device), place.dtype
        self._recording = how if how.model is not None else replace(how, model=fingerprint(pipeline.transformer))
        self.ranks, self._split = current() if place.ranks is None else place.ranks, False
        self._folder = Path(folder) / self.fingerprint[:16]
        self._groups: dict[int, list[int]] = {}
        self._open: tuple[int, int, Batches] | None = None
        self._start = SourceState(seed=seed, step=0, epoch=0, position=0, within=0)

    @property
    def fingerprint(self) -> str:
        """The hash of the prompts, the teacher, and how they are recorded."""
        arguments = {name: repr(value) for name, value in sorted(self._recording.arguments.items())}
        plain = json.dumps([self._recording.model, self._parts, self._seed, self._recording.batch_size, arguments])
        return hashlib.sha256(plain.encode()).hexdigest()

    def split(self) -> Self:
        """Return the same batches as `ppcl_fx.train.distributed.batch_split.SplitBatch`: this rank's samples."""
        other = copy.copy(self)
        other._split, other._open = True, None
        return other

    def kwargs(self, step: int) -> dict[str, Any]:
        """See `Feed`; records what was not recorded yet. Raises PpclError where a part is damaged or of another
        teacher, or the pipeline refuses its arguments.
        """
        batches, position = self._at(step)
        return batches.kwargs(position)

    def target(self, step: int) -> Tensor | None:
        """See `Feed`: the output was recorded with the call."""
        batches, position = self._at(step)
        return batches.target(position)

    def samples(self, step: int) -> int:
        batches, position = self._at(step)
        return batches.samples(position)

    def names(self, step: int) -> str:
        """See `Feed`: the calls, and the part they were recorded in."""
        epoch, turn, _ = self._place(step)
        batches, position = self._at(step)
        return f"{batches.names(position)} of part {self._turns(epoch)[turn]}"

    def state(self, step: int) -> SourceState:
        """Return where the source stands before `step`."""
        epoch, turn, within = self._place(step)
        begun = self._start["position"] if epoch == self._start["epoch"] else 0
        return SourceState(seed=self._seed, step=step, epoch=epoch, position=begun + turn, within=within)

    def restore(self, state: SourceState) -> None:
        """Go on from `state`, which any number of ranks left; earlier parts need not be there. Raises PpclError where
        it belongs to other prompts or another seed.
        """
        if state["seed"] != self._seed or not 0 <= state["position"] < len(self._parts):
            raise PpclError(
                f"the prompts stood at part {state['position']} with seed {state['seed']}, and now are "
                f"{len(self._parts)} parts with seed {self._seed}; train with the same prompts and seed"
            )
        self._start = state

    def _turns(self, epoch: int) -> list[int]:
        """The parts of an epoch in their order; of the first one, those that are left."""
        order = list(range(len(self._parts)))
        if epoch:
            random.Random(f"ppcl-fx parts {self._seed} {epoch}").shuffle(order)
        return order[self._start["position"] :] if epoch == self._start["epoch"] else order

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch, which of its parts that are left, and which batch of that part `step` is."""
        left, epoch = step - self._start["step"] + self._start["within"], self._start["epoch"]
        if left < 0:
            raise PpclError(f"step {step} comes before step {self._start['step']}, where the prompts went on")
        while True:
            for turn, part in enumerate(self._turns(epoch)):
                # The first batch needs no length, so that asking where training stands records nothing.
                if not left or left < (length := self._length(part)):
                    return epoch, turn, left
                left -= length
            epoch += 1

    def _length(self, part: int) -> int:
        """Return the batches of a part; of one that was recorded, without reading its calls."""
        if part not in self._groups:
            folder = self._recorded(part)
            self._groups[part] = self.ranks.each(lambda: read_json(inside(folder, CARD), _Card)).groups
        return sum(-(-size // self._batch) for size in self._groups[part])

    def _at(self, step: int) -> tuple[Batches, int]:
        """The batches of the part that `step` is in, and which of them it is."""
        epoch, turn, position = self._place(step)
        part = self._turns(epoch)[turn]
        if self._open is None or self._open[:2] != (epoch, part):
            self._length(part)  # records it
            calls = self.ranks.each(lambda: self._calls(part))
            # The epoch is in the seed, because a part's own batches always begin at their step 0.
            seed = self._seed + 1_000_003 * epoch + part
            how: dict[str, Any] = {"device": self._device, "dtype": self._dtype, "split": self._split}
            self._open = (epoch, part, Batches(calls, self._batch, seed, ranks=self.ranks, **how))
        return self._open[2], position

    def _calls(self, part: int) -> Calls:
        folder = self._home(part)
        calls = Calls.open(folder / CALLS)
        texts = {text for call in calls for text in call.prompts}
        if calls.model != self._recording.model or texts != set(self._parts[part]):
            raise PpclError(f"{folder}: was recorded from something else; remove {self._folder}")
        return calls

    def _home(self, part: int, end: str = "") -> Path:
        return self._folder / f"part-{part:05d}{end}"

    def _run(self, part: int, start: int) -> Path:
        return self._home(part, ".runs") / f"{start:03d}"

    def _recorded(self, part: int) -> Path:
        folder = self._home(part)
        # Rank 0 alone looks, and before the rest is done: the ranks must not be of two minds.
        missing: list[int] | None = self.ranks.from_first(self._missing(part) if self.ranks.first else None)
        if missing is not None:
            if self._recording.told is not None:
                self._recording.told(part)
            self.ranks.each(lambda: self._draw(part, missing[self.ranks.rank :: self.ranks.world]))
            self.ranks.each(lambda: self._join(part) if self.ranks.first else None)
        self.ranks.each(lambda: wait_for(folder, self.ranks))
        return folder

    def _missing(self, part: int) -> list[int] | None:
        """The first prompts of the runs that are still to be drawn; None where the part is whole."""
        if self._home(part).exists():
            owned.discard(self._home(part, ".runs"), owned.RUNS)  # a kill may have left it
            return None
        return [start for start in self._starts(part) if not self._run(part, start).exists()]

    def _starts(self, part: int) -> range:
        return range(0, len(self._parts[part]), self._recording.batch_size)

    def _draw(self, part: int, starts: Sequence[int]) -> None:
        """Draw some runs of a part, and keep each: a kill costs no more than one."""
        devices = [self._device] if self._device.type == "cuda" else []
        size, model = self._recording.batch_size, self._recording.model or ""
        for start in starts:
            prompts = self._parts[part][start : start + size]
            seed = self._seed + part * len(self._parts[0]) + start
            # Whether a run is drawn now, before a kill or by another rank must not change what training draws.
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                calls = record(self._pipeline, prompts, batch_size=size, seed=seed, **self._recording.arguments)
            # The students may have changed since, where the pipeline runs a pluggable model; the teacher has not.
            Calls(list(calls), model).save(self._run(part, start))

    def _join(self, part: int) -> None:
        found = []
        for start in self._starts(part):
            wait_for(self._run(part, start), self.ranks)
            found += list(Calls.open(self._run(part, start)))
        calls = Calls([replace(call, index=number) for number, call in enumerate(found)], self._recording.model or "")
        with new_folder(self._home(part)) as new:
            calls.save(new / CALLS)
            write_json(new / CARD, _Card(groups=[len(group) for group in groups(calls)]))
        owned.discard(self._home(part, ".runs"), owned.RUNS)
