"""Prompts: the teacher makes its own training data while training goes on."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.train.core.batches import Batches
from ppcl_fx.train.data.parts import Parts, Recording
from ppcl_fx.train.data.source import SourceState
from ppcl_fx.train.distributed.process_group import Place, ProcessGroup, current


class PromptSource:
    """Calls that the teacher's pipeline makes while it draws prompts. A `DistributedSource`.

    The prompts are shuffled once and cut into parts. A part is recorded when training comes to it, saved as
    ``FOLDER/<fingerprint>/part-00000`` and so on, and trained on for as many steps as its calls fill. Later
    epochs go through the saved parts, each time in another order. Ranks draw different prompts of a part, and then
    all train on the whole of it. A kill costs each rank one run of the pipeline at most. Only one part is in memory.

    Args:
        pipeline: Any diffusers pipeline with a `transformer`, which must compute the teacher's output whenever
            `kwargs` is called.
        prompts: What to draw.
        folder: Where the recorded parts are kept; a disk that all ranks see.
        batch: Calls for one step.
        seed: Decides the parts, their order, and the starting noise.
        place: Where the tensors go.
        recording: How prompts are recorded.

    Raises:
        PpclError: There are no prompts, or too few at a time.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        folder: str | Path,
        batch: int,
        seed: int,
        place: Place | None = None,
        recording: Recording | None = None,
    ) -> None:
        place, how = place or Place(), recording or Recording()
        if not prompts:
            raise PpclError("there are no prompts to train on; give a file with one prompt a line")
        if how.part < 1 or how.batch_size < 1:
            raise PpclError(f"{min(how.part, how.batch_size)} prompts at a time are too few; use 1 or more")
        shuffled = random.Random(f"ppcl-fx prompts {seed}").sample(list(prompts), len(prompts))
        self._parts = [shuffled[i : i + how.part] for i in range(0, len(shuffled), how.part)]
        self._batch, self._seed, self._device, self._dtype = batch, seed, torch.device(place.device), place.dtype
        self._recording = how if how.model is not None else replace(how, model=fingerprint(pipeline.transformer))
        self._ranks, self._split = current() if place.ranks is None else place.ranks, False
        parts = Path(folder) / self.fingerprint[:16]
        self._recorded = Parts(pipeline, self._parts, parts, seed, self._recording, self._device, self._ranks)
        self._open: tuple[int, int, Batches] | None = None
        self._start = SourceState(seed=seed, step=0, epoch=0, position=0, within=0)

    @property
    def fingerprint(self) -> str:
        """The hash of the prompts, the teacher, and how they are recorded."""
        arguments = {name: repr(value) for name, value in sorted(self._recording.arguments.items())}
        plain = json.dumps([self._recording.model, self._parts, self._seed, self._recording.batch_size, arguments])
        return hashlib.sha256(plain.encode()).hexdigest()

    @property
    def ranks(self) -> ProcessGroup:
        """This process among those that record together."""
        return self._ranks

    def split(self) -> Self:
        """Return the same batches as `ppcl_fx.train.distributed.batch_split.SplitBatch`: this rank's samples."""
        other = copy.copy(self)
        other._split, other._open = True, None
        return other

    def kwargs(self, step: int) -> dict[str, Any]:
        """Return the transformer's keyword arguments of the batch of `step`; records what was not recorded yet.

        Raises:
            PpclError: A recorded part is damaged or of another teacher, or the pipeline refuses its arguments.
        """
        batches, position = self._at(step)
        return batches.kwargs(position)

    def target(self, step: int) -> Tensor | None:
        """Return the teacher's output for the batch of `step`, which was recorded with it."""
        batches, position = self._at(step)
        return batches.target(position)

    def samples(self, step: int) -> int:
        """Return the number of samples in the batch of `step`."""
        batches, position = self._at(step)
        return batches.samples(position)

    def names(self, step: int) -> str:
        """Return the batch of `step` for a message: its calls, and the part they were recorded in."""
        epoch, turn, _ = self._place(step)
        batches, position = self._at(step)
        return f"{batches.names(position)} of part {self._turns(epoch)[turn]}"

    def state(self, step: int) -> SourceState:
        """Return where the source stands before `step`."""
        epoch, turn, within = self._place(step)
        begun = self._start["position"] if epoch == self._start["epoch"] else 0
        return SourceState(seed=self._seed, step=step, epoch=epoch, position=begun + turn, within=within)

    def restore(self, state: SourceState) -> None:
        """Go on from `state`, which any number of ranks left; earlier parts need not be there.

        Raises:
            PpclError: The state belongs to other prompts or another seed.
        """
        if state["seed"] != self._seed or not 0 <= state["position"] < len(self._parts):
            raise PpclError(
                f"the prompts stood at part {state['position']} with seed {state['seed']}, and now are "
                f"{len(self._parts)} parts with seed {self._seed}; train with the same prompts and seed"
            )
        self._start = state

    def _at(self, step: int) -> tuple[Batches, int]:
        """The batches of the part that `step` is in, and which of them it is."""
        epoch, turn, position = self._place(step)
        return self._batches(epoch, self._turns(epoch)[turn]), position

    def _turns(self, epoch: int) -> list[int]:
        """The parts of an epoch in their order; of the first one, those that are left."""
        order = list(range(len(self._parts)))
        if epoch:
            random.Random(f"ppcl-fx parts {self._seed} {epoch}").shuffle(order)
        if epoch == self._start["epoch"]:
            order = order[self._start["position"] :]
        return order

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch, which of its parts that are left, and which batch of that part `step` is."""
        left, epoch = step - self._start["step"] + self._start["within"], self._start["epoch"]
        if left < 0:
            raise PpclError(f"step {step} comes before step {self._start['step']}, where the prompts went on")
        while True:
            for turn, part in enumerate(self._turns(epoch)):
                # The first batch needs no length, so that asking where training stands records nothing.
                if not left or left < self._length(part):
                    return epoch, turn, left
                left -= self._length(part)
            epoch += 1

    def _length(self, part: int) -> int:
        """Return the batches of a part; of one that was recorded, without reading its calls."""
        return sum(-(-size // self._batch) for size in self._recorded.groups(part))

    def _batches(self, epoch: int, part: int) -> Batches:
        if self._open is None or self._open[:2] != (epoch, part):
            # The epoch is in the seed, because a part's own batches always begin at their step 0.
            seed = self._seed + 1_000_003 * epoch + part
            batches = Batches(
                self._recorded.calls(part),
                self._batch,
                seed,
                device=self._device,
                dtype=self._dtype,
                ranks=self._ranks,
                split=self._split,
            )
            self._open = (epoch, part, batches)
        return self._open[2]
