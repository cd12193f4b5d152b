"""Prompts: the teacher makes its own training data while training goes on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ppcl_fx.calls import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.files import new_folder, read_json, write_json
from ppcl_fx.fingerprint import fingerprint
from ppcl_fx.recording import record
from ppcl_fx.train.data import Batches, groups
from ppcl_fx.train.sources.order import check_rank
from ppcl_fx.train.sources.source import State

PART = 8
"""Prompts that are recorded at a time."""
CALLS, CARD = "calls", "part.json"
"""What the folder of a part holds."""


class _Card(BaseModel):
    """What is known of a recorded part without its tensors: how many calls may come together, group by group."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    groups: list[int]


class PromptSource:
    """Calls that the teacher's pipeline makes while it draws prompts. A `Source`.

    The prompts are shuffled once and cut into parts. A part is recorded when training comes to it, saved as
    ``FOLDER/<fingerprint>/part-00000`` and so on, and trained on for as many steps as its calls fill. Later
    epochs go through the saved parts, each time in another order. A part is there as a whole or not at all, so a
    kill costs at most the recording of one. Ranks own different parts, and none waits for another. Only one part
    is in memory.

    Args:
        pipeline: Any diffusers pipeline with a `transformer`, which must compute the teacher's output whenever
            `kwargs` is called.
        prompts: What to draw.
        folder: Where the recorded parts are kept.
        batch: Calls for one step.
        seed: Decides the parts, their order, and the starting noise.
        device: Where the tensors go.
        dtype: What the floating tensors of the calls' main dtype become; None leaves them.
        rank: Which of the processes this is.
        world: Number of processes.
        part: Prompts that are recorded at a time.
        batch_size: Prompts in one run of the pipeline, and samples in one call.
        model: The teacher's fingerprint; None: that of the pipeline's transformer now.
        told: Called with the number of a part before it is recorded.
        **recording: Goes to `ppcl_fx.record`: ``num_inference_steps``, and the pipeline's own arguments.

    Raises:
        PpclError: There are no prompts, or fewer parts than processes.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        folder: str | Path,
        batch: int,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        part: int = PART,
        batch_size: int = 1,
        model: str | None = None,
        told: Callable[[int], None] | None = None,
        **recording: Any,
    ) -> None:
        check_rank(rank, world)
        if not prompts:
            raise PpclError("there are no prompts to train on; give a file with one prompt a line")
        if part < 1 or batch_size < 1:
            raise PpclError(f"{min(part, batch_size)} prompts at a time are too few; use 1 or more")
        shuffled = random.Random(f"ppcl-fx prompts {seed}").sample(list(prompts), len(prompts))
        self._parts = [shuffled[i : i + part] for i in range(0, len(shuffled), part)]
        if len(self._parts) < world:
            raise PpclError(
                f"{len(prompts)} prompts are {len(self._parts)} parts for {world} processes; give more prompts"
            )
        self._pipeline, self._told = pipeline, told
        self._batch, self._seed, self._device, self._dtype = batch, seed, torch.device(device), dtype
        self._rank, self._world, self._part, self._batch_size = rank, world, part, batch_size
        self._recording = recording
        self._model = fingerprint(pipeline.transformer) if model is None else model
        self._folder = Path(folder) / self.fingerprint[:16]
        self._lengths: dict[int, int] = {}
        self._open: tuple[int, int, Batches] | None = None
        self._start = State(seed=seed, step=0, epoch=0, position=0)

    @property
    def fingerprint(self) -> str:
        """The hash of the prompts, the teacher, and how they are recorded."""
        how = {name: repr(value) for name, value in sorted(self._recording.items())}
        plain = json.dumps([self._model, self._parts, self._seed, self._batch_size, how])
        return hashlib.sha256(plain.encode()).hexdigest()

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

    def state(self, step: int) -> State:
        """Return where the source stands before `step`: the parts that any rank has begun count as done.

        On the same number of ranks the step alone is enough, and goes on to the very batch.
        """
        epoch, turn, _ = self._place(step)
        begun = self._start["position"] if epoch == self._start["epoch"] else 0
        # Ranks walk alike but for the last parts, whose number of calls may differ.
        position = min(begun + turn * self._world, len(self._parts) - 1)
        return State(seed=self._seed, step=step, epoch=epoch, position=position)

    def restore(self, state: State) -> None:
        """Go on from a state of another number of ranks, at the beginning of a part.

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
        """The parts of an epoch that are this rank's, in their order."""
        order = list(range(len(self._parts)))
        if epoch:
            random.Random(f"ppcl-fx parts {self._seed} {epoch}").shuffle(order)
        if epoch == self._start["epoch"]:
            order = order[self._start["position"] :]
        return order[self._rank :: self._world]

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch, which of the rank's parts in it, and which batch of that part `step` is."""
        left, epoch = step - self._start["step"], self._start["epoch"]
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
        if part not in self._lengths:
            folder = self._recorded(part)
            groups = read_json(folder / CARD, _Card).groups
            self._lengths[part] = sum(-(-size // self._batch) for size in groups)
        return self._lengths[part]

    def _batches(self, epoch: int, part: int) -> Batches:
        if self._open is None or self._open[:2] != (epoch, part):
            # The epoch is in the seed, because a part's own batches always begin at their step 0.
            seed = self._seed + 1_000_003 * epoch + part
            batches = Batches(self._calls(part), self._batch, seed, device=self._device, dtype=self._dtype)
            self._open = (epoch, part, batches)
        return self._open[2]

    def _calls(self, part: int) -> Calls:
        folder = self._recorded(part)
        calls = Calls.open(folder / CALLS)
        texts = {text for call in calls for text in call.prompts}
        if calls.model != self._model or texts != set(self._parts[part]):
            raise PpclError(f"{folder}: was recorded from something else; remove {self._folder}")
        return calls

    def _recorded(self, part: int) -> Path:
        """Return the folder of a part, after recording it where that was not done yet."""
        folder = self._folder / f"part-{part:05d}"
        if not folder.exists():
            self._record(part, folder)
        return folder

    def _record(self, part: int, folder: Path) -> None:
        if self._told is not None:
            self._told(part)
        devices = [self._device] if self._device.type == "cuda" else []
        # Whether a part is recorded now or was before a kill must not change the numbers that training draws.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed + part)
            calls = record(
                self._pipeline,
                self._parts[part],
                batch_size=self._batch_size,
                seed=self._seed + part * self._part,
                **self._recording,
            )
        # The students may have changed since, where the pipeline runs a pluggable model; the teacher has not.
        calls = Calls(list(calls), self._model)
        with new_folder(folder) as new:
            calls.save(new / CALLS)
            write_json(new / CARD, _Card(groups=[len(group) for group in groups(calls)]))
