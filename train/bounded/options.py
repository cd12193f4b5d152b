"""What a memory-bounded training is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ppcl_fx.train.bounded.costs import ProblemCost, TeacherCost
from ppcl_fx.train.bounded.schedule import Schedule
from ppcl_fx.train.curves import StageCurves
from ppcl_fx.train.options import Beta, Clip, Count, Decay, Seed, TermWeights
from ppcl_fx.train.schedule import BETAS, WEIGHT_DECAY

STAGES = ("depth", "width")
"""The stages that can be trained so: fine-tuning needs the whole mixture in memory."""


class BoundedOptions(BaseModel):
    """The options of a run. All but `checkpointing` and `every` decide the numbers that come out.

    Attributes:
        stages: "depth", "width", or both in this order.
        steps: steps of each stage.
        batch: calls of one batch. They go through a student one after the other; gradients add up.
        accumulate: batches of one step; each counts the same.
        lr: peak learning rate.
        warmup: steps up to it, None for a twentieth of the stage, at most 100.
        optimizer: "adamw" or "adamw8bit".
        betas: AdamW's.
        weight_decay: AdamW's.
        seed: decides the order of the calls and the split of the held-out ones.
        weights: weights of the loss terms.
        clip: the largest norm of the gradients of one edit, None for no limit.
        ema: decay of an average of the weights, which is evaluated and kept; None for no average.
        held_out: share of the calls that is never trained on.
        evaluate_every: steps between evaluations on them; a stage's end has one too.
        patience: evaluations without gain until a student stops, None for never.
        min_gain: share of the best held-out loss by which a new one must be lower to be a gain.
        autocast: dtype of matrix products ("bfloat16"), or None for the tensors' own.
        checkpointing: compute the students' insides again in the backward pass.
        every: steps between checkpoints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[str, ...]
    steps: tuple[Count, ...]
    batch: Count = 2
    accumulate: Count = 1
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    warmup: int | None = Field(None, ge=0, le=10**9)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[Beta, Beta] = BETAS
    weight_decay: Decay = WEIGHT_DECAY
    seed: Seed = 42
    weights: TermWeights = TermWeights()
    clip: Clip | None = 1.0
    ema: float | None = Field(None, ge=0, lt=1)
    held_out: float = Field(0.0, ge=0, lt=1)
    evaluate_every: Count = 100
    patience: Count | None = None
    min_gain: float = Field(0.005, ge=0, lt=1)
    autocast: Literal["bfloat16", "float16"] | None = None
    checkpointing: bool = False
    every: Count = 100

    def decisive(self) -> dict[str, Any]:
        """Return the options that a resumed run must share, as JSON-able values."""
        return self.model_dump(mode="json", exclude={"checkpointing", "every"})

    @property
    def cast(self) -> torch.dtype | None:
        """`autocast` as a dtype."""
        return (
            None
            if self.autocast is None
            else {"bfloat16": torch.bfloat16, "float16": torch.float16}[self.autocast]
        )


@dataclass(frozen=True)
class StageSchedule:
    """What is going to be done for a stage.

    Attributes:
        stage: its name.
        steps: its steps.
        students: ids of the edits of each student that is not finished yet.
        schedule: the way; None where every student is finished.
        costs: what the schedule rests on: each student's costs.
        teacher: and the teacher's.
    """

    stage: str
    steps: int
    students: tuple[tuple[str, ...], ...]
    schedule: Schedule | None
    costs: tuple[ProblemCost, ...] = ()
    teacher: TeacherCost | None = None


@dataclass(frozen=True)
class BoundedResult:
    """What a memory-bounded training gave.

    Attributes:
        schedules: one for each stage, in order.
        lines: the schedules in words, as they are printed before the training starts.
        stages: the curves; empty for a dry run.
        stopped: edit id -> why it ended before its last step: it has converged, or its loss was NaN and its weights
            are those after the last good step.
        losses: the file with the curves; None for a dry run.
        seconds: wall time of this process's part.
    """

    schedules: Sequence[StageSchedule]
    lines: Sequence[str]
    stages: tuple[StageCurves, ...] = ()
    stopped: dict[str, str] | None = None
    losses: Path | None = None
    seconds: float = 0.0
