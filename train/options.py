"""The options of a training run: one typed model, which is the config file, the keyword arguments of `train`
and the options of ``ppcl-fx train``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from ppcl_fx.errors import PpclError, near

STAGES = ("depth", "width", "finetune")
"""The stages of training, in the paper's order."""

INDIFFERENT = frozenset({"checkpointing", "every", "tensorboard", "log", "log_every", "score_prompts", "effects"})
"""Options that do not change the numbers that come out: a resumed run may have others."""


Count = Annotated[int, Field(gt=0, le=10**9)]
"""How many of something: steps, calls, evaluations."""
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
"""A learning rate. AdamW moves each weight by about as much in a step."""
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Clip = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class TermWeights(BaseModel):
    """Weights of the loss terms as they are stored; `ppcl_fx.train.losses.Weights` explains each."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image: Weight = Field(1.0, description="image stream's direction (Eq. 6, 11)")
    text: Weight = Field(1.0, description="text stream's direction (Eq. 6, 11)")
    linear: Weight = Field(1.0, description="projectors' plain errors (Eq. 12)")
    attention: Weight = Field(0.0, description="attention outputs' direction")
    relative: Weight = Field(0.0, description="streams' relative squared error")

    @model_validator(mode="after")
    def _some(self) -> TermWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all of them are 0, so there is nothing to learn")
        return self


class Options(BaseModel):
    """Every option of a run; `docs/training.md` has them in a table. ``None`` is written "none" in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stages: tuple[str, ...] = Field(STAGES, description="some of depth, width, finetune, in that order")
    steps: tuple[Count, ...] = Field((600, 200, 100), description="steps of each stage, in the same order")
    batch: Count = Field(2, description="calls in one forward pass")
    accumulate: Count = Field(1, description="forward and backward passes in one step")
    lr: Rate = Field(1e-3, description="peak learning rate of depth and width")
    finetune_lr: Rate = Field(3e-4, description="peak learning rate of finetune")
    warmup: int | None = Field(None, ge=0, le=10**9, description="warm-up steps; none: a twentieth, at most 100")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs bitsandbytes")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas (Sec. 4.1)")
    weight_decay: Decay = Field(0.02, description="AdamW's decay (Sec. 4.1)")
    clip: Clip | None = Field(1.0, description="largest gradient norm of one edit; none: no limit")
    ema: float | None = Field(None, ge=0, lt=1, description="decay of an average of the weights, the result")
    seed: Seed = Field(42, description="seed of everything random")
    sequential: StrictBool = Field(False, description="feed each student the one before it (a control)")
    keep: float | None = Field(None, gt=0, le=1, description="share of the mixture to fine-tune; none: least")
    autocast: StrictBool | None = Field(None, description="bf16 matrix products; none: float32 on CUDA only")
    checkpointing: StrictBool = Field(False, description="gradient checkpointing, block by block")
    compile: StrictBool = Field(False, description="torch.compile of the student blocks")
    compile_backend: str = Field("inductor", description="torch.compile's backend")
    recorded: Literal["exact", "always", "never"] = Field(
        "exact", description="use the teacher's recorded outputs in finetune: where equal to the bit, or not"
    )
    held_out: float = Field(0.0, ge=0, lt=1, description="share of the calls that is never trained on")
    evaluate_every: Count = Field(100, description="steps between evaluations on the held-out calls")
    patience: Count | None = Field(None, description="evaluations without gain until a student stops")
    min_gain: float = Field(0.005, ge=0, lt=1, description="share of the best loss that counts as a gain")
    score_prompts: int = Field(0, ge=0, le=10**6, description="pictures a category scored at evaluations ('shapes')")
    effects: int = Field(0, ge=0, le=10**9, description="calls to measure students' effects on afterwards")
    every: Count = Field(100, description="steps between checkpoints")
    log: str | None = Field(None, min_length=1, pattern=r"^[^\x00]*$", description="folder of the logs; none: RUN/logs")
    log_every: Count = Field(1, description="steps between lines of log.jsonl")
    tensorboard: StrictBool | None = Field(None, description="TensorBoard events; none: where installed")
    weights: TermWeights = Field(TermWeights(), description="weights of the loss terms")

    @field_validator("log")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        """A path in a file, or in quotes, has met no shell that expands its ``~``."""
        return None if value is None else os.path.expanduser(value)

    @model_validator(mode="after")
    def _used(self) -> Options:
        if self.compile_backend != "inductor" and not self.compile:
            raise ValueError(f"compile_backend {self.compile_backend!r} has no use without compile")
        return self

    def decisive(self) -> dict[str, Any]:
        """Return the options that a resumed run must share, as JSON-able values."""
        return self.model_dump(mode="json", exclude=set(INDIFFERENT))


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
