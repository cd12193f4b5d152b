"""What one training run was asked for: checked once, written into each checkpoint, compared when a run goes
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ppcl_fx.errors import PpclError, near

STAGES = ("depth", "width", "finetune")
"""The stages of training, in the paper's order."""


class TermWeights(BaseModel):
    """Weights of the loss terms as they are stored; `ppcl_fx.train.losses.Weights` explains each."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image: float = Field(1.0, ge=0)
    text: float = Field(1.0, ge=0)
    linear: float = Field(1.0, ge=0)
    attention: float = Field(0.0, ge=0)
    relative: float = Field(0.0, ge=0)


class Options(BaseModel):
    """The options of a run. All but `checkpointing` and `every` decide the numbers that come out."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[str, ...]
    steps: tuple[int, ...]
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    finetune_lr: float = Field(gt=0)
    seed: int
    sequential: bool
    autocast: str | None
    students: tuple[str, ...]
    weights: TermWeights
    clip: float | None = Field(gt=0)
    ema: float | None = Field(ge=0, lt=1)
    checkpointing: bool
    every: int = Field(gt=0)

    def decisive(self) -> dict[str, Any]:
        """Return the options that a resumed run must share, as JSON-able values."""
        return self.model_dump(mode="json", exclude={"checkpointing", "every"})


def plan_stages(
    stages: Sequence[str], steps: Sequence[int] | Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Check `stages` against the known ones and give each its number of steps.

    `steps` is a list as long as `stages` or a mapping from stage to steps.

    Raises:
        PpclError: An unknown or repeated stage, stages out of order, another number of steps than stages, or
            steps below 1.
    """
    names = tuple(stages)
    if not names:
        raise PpclError(f"no stage to train: give some of {', '.join(STAGES)}")
    for name in names:
        if name not in STAGES:
            raise PpclError(f"unknown stage {name!r}{near(name, STAGES)}: the stages are {', '.join(STAGES)}")
    if list(names) != [name for name in STAGES if name in names]:
        raise PpclError(f"stages {','.join(names)} are out of order or repeated: keep to {','.join(STAGES)}")
    if isinstance(steps, Mapping):
        counts = _from_mapping(names, steps)
    else:
        counts = tuple(steps)
        if len(counts) != len(names):
            raise PpclError(
                f"{len(names)} stages but {len(counts)} numbers of steps: give one each for {','.join(names)}"
            )
    for name, count in zip(names, counts, strict=True):
        if count < 1:
            raise PpclError(f"stage {name} has {count} steps: give at least 1, or leave the stage out")
    return names, counts


def _from_mapping(names: tuple[str, ...], steps: Mapping[str, int]) -> tuple[int, ...]:
    for name in steps:
        if name not in names:
            raise PpclError(
                f"steps for {name!r}{near(name, names)}, which is not among the stages {','.join(names)}"
            )
    missing = [name for name in names if name not in steps]
    if missing:
        raise PpclError(f"no number of steps for stage {missing[0]}: add it to steps")
    return tuple(steps[name] for name in names)
