"""Prompts cut into parts, each recorded once: the runs of the pipeline are divided among the ranks.

A run draws `batch_size` prompts with seeds of its own, so who draws it, and when, changes no number.
``FOLDER/part-00000.runs/000/`` holds a run while its part is not whole; ``FOLDER/part-00000/`` is a whole part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.calls.record import record
from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import inside, new_folder, read_json, write_json
from ppcl_fx.train.core.batches import groups
from ppcl_fx.train.distributed.process_group import ProcessGroup, wait_for

CALLS, CARD = "calls", "part.json"
"""What the folder of a part holds."""


class _Card(BaseModel):
    """What is known of a recorded part without its tensors: how many calls may come together, group by group."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    groups: list[int]


@dataclass(frozen=True)
class Recording:
    """How prompts are recorded.

    Attributes:
        part: Prompts that are recorded at a time.
        batch_size: Prompts in one run of the pipeline, and samples in one call.
        model: The teacher's fingerprint; None: that of the pipeline's transformer now.
        told: Called with the number of a part before it is recorded.
        arguments: Goes to `ppcl_fx.record`: ``num_inference_steps``, and the pipeline's own arguments.
    """

    part: int = 8
    batch_size: int = 1
    model: str | None = None
    told: Callable[[int], None] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Parts:
    """Recorded parts of a list of prompts. With several ranks all of them ask for the same part at the same time.

    Args:
        pipeline: Draws the prompts.
        prompts: Those of each part.
        folder: Where the parts are kept; a disk that all ranks see.
        seed: Prompt number i of all starts from noise of the seed ``seed + i``.
        recording: How they are recorded; its `model` is known.
        device: Whose random state is left as it was.
        ranks: This process among the others.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Sequence[str]],
        folder: Path,
        seed: int,
        recording: Recording,
        device: torch.device,
        ranks: ProcessGroup,
    ) -> None:
        self._pipeline, self._prompts, self._folder, self._seed = pipeline, prompts, folder, seed
        self._recording, self._device, self._ranks = recording, device, ranks
        self._groups: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._prompts)

    def groups(self, part: int) -> list[int]:
        """Return how many calls of a part may come together, group by group; records it where that was not done.

        Raises:
            PpclError: The pipeline refuses its arguments, or the part cannot be written or read. The same line on
                every rank.
        """
        if part not in self._groups:
            folder = self._recorded(part)
            self._groups[part] = self._ranks.each(lambda: read_json(inside(folder, CARD), _Card)).groups
        return self._groups[part]

    def calls(self, part: int) -> Calls:
        """Return the calls of a part; records it where that was not done.

        Raises:
            PpclError: As `groups`; or the part is damaged, or of another teacher.
        """
        self.groups(part)
        return self._ranks.each(lambda: self._opened(part))

    def _opened(self, part: int) -> Calls:
        folder = self._place(part)
        calls = Calls.open(folder / CALLS)
        texts = {text for call in calls for text in call.prompts}
        if calls.model != self._recording.model or texts != set(self._prompts[part]):
            raise PpclError(f"{folder}: was recorded from something else; remove {self._folder}")
        return calls

    def _place(self, part: int) -> Path:
        return self._folder / f"part-{part:05d}"

    def _runs(self, part: int) -> Path:
        return self._folder / f"part-{part:05d}.runs"

    def _recorded(self, part: int) -> Path:
        """Return the folder of a part, after recording it where that was not done yet."""
        folder = self._place(part)
        # Rank 0 alone looks, and before the rest is done: the ranks must not be of two minds.
        missing = self._ranks.gather(self._missing(part) if self._ranks.first else None)[0]
        if missing is not None:
            if self._recording.told is not None:
                self._recording.told(part)
            self._ranks.each(lambda: self._draw(part, missing[self._ranks.rank :: self._ranks.world]))
            self._ranks.each(lambda: self._join(part))
        self._ranks.each(lambda: wait_for(folder, self._ranks))
        return folder

    def _missing(self, part: int) -> list[int] | None:
        """The first prompts of the runs that are still to be drawn; None where the part is whole."""
        runs = self._runs(part)
        if self._place(part).exists():
            owned.discard(runs, owned.RUNS)  # a kill may have left it
            return None
        there = {path.name for path in runs.iterdir()} if runs.is_dir() else set()
        return [start for start in self._starts(part) if f"{start:03d}" not in there]

    def _starts(self, part: int) -> range:
        return range(0, len(self._prompts[part]), self._recording.batch_size)

    def _draw(self, part: int, starts: Sequence[int]) -> None:
        """Draw some runs of a part, and keep each: a kill costs no more than one."""
        devices = [self._device] if self._device.type == "cuda" else []
        for start in starts:
            seed = self._seed + part * len(self._prompts[0]) + start
            # Whether a run is drawn now, before a kill or by another rank must not change what training draws.
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                calls = record(
                    self._pipeline,
                    self._prompts[part][start : start + self._recording.batch_size],
                    batch_size=self._recording.batch_size,
                    seed=seed,
                    **self._recording.arguments,
                )
            # The students may have changed since, where the pipeline runs a pluggable model; the teacher has not.
            Calls(list(calls), self._recording.model or "").save(self._runs(part) / f"{start:03d}")

    def _join(self, part: int) -> None:
        """On rank 0, make one part of its runs, in the order of the prompts."""
        if not self._ranks.first:
            return
        found = []
        for start in self._starts(part):
            run = self._runs(part) / f"{start:03d}"
            wait_for(run, self._ranks)
            found += list(Calls.open(run))
        calls = Calls([replace(call, index=number) for number, call in enumerate(found)], self._recording.model or "")
        with new_folder(self._place(part)) as new:
            calls.save(new / CALLS)
            write_json(new / CARD, _Card(groups=[len(group) for group in groups(calls)]))
        owned.discard(self._runs(part), owned.RUNS)
