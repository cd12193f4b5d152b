"""The options of a training run: the config file, the arguments of `train`, and the flags of ``ppcl-fx train``."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, ValidationError, field_validator, model_validator

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import Record, write_text
from ppcl_fx.io.options import Flag
from ppcl_fx.io.reading import read_text

STAGES = ("depth", "width", "finetune")
"""The stages of training, in the paper's order."""
INDIFFERENT = frozenset({"checkpointing", "every", "tensorboard", "log", "log_every", "score_prompts", "effects"})
"""Options that do not change the numbers that come out: a resumed run may have others."""
NOT_BOUNDED = ("keep", "sequential", "compile", "compile_backend", "score_prompts", "effects")
"""Options that a run within a memory limit refuses."""
UNUSED_BOUNDED = ("finetune_lr", "recorded", "log", "log_every", "tensorboard")
"""Options that have nothing to act on within a memory limit: it does not fine-tune, and writes no logs."""
CONFIG = "train.toml"
"""The complete config that a run used, in its folder."""
TOML_BYTES, LONGEST_LINE = 2**16, 4096
"""Bounds of a config file: what Python's reader of TOML takes grows with the square of a dotted name's length."""
NONE = "none"
"""TOML has no null; an option that is off is written so."""
NO_LIMIT = 2**62
"""Bytes that stand for no limit."""

Count = Annotated[int, Field(gt=0, le=10**9)]
"""How many of something: steps, calls, evaluations."""
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
"""A learning rate. AdamW moves each weight by about as much in a step."""
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Clip = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Weights(Record):
    """How much each kind of term counts in an edit's loss."""

    image: Weight = Field(1.0, description="image stream's direction (Eq. 6, 11)")
    text: Weight = Field(1.0, description="text stream's direction (Eq. 6, 11)")
    linear: Weight = Field(1.0, description="projectors' plain errors (Eq. 12)")
    attention: Weight = Field(0.0, description="attention outputs' direction")
    relative: Weight = Field(0.0, description="streams' relative squared error")
    """Added to "image" and "text": Eq. 6 sees directions only, this sees lengths too."""

    @model_validator(mode="after")
    def _some(self) -> Weights:
        if not any(self.model_dump().values()):
            raise ValueError("all of them are 0, so there is nothing to learn")
        return self


class Limits(Record):
    """What a run within a memory limit may use: bytes, None for no limit.

    Memory-mapped weights do not count: the system takes them back when it needs to.
    """

    memory: int | None = Field(None, description="memory that the process may hold; none: no limit")
    disk: int | None = Field(None, description="disk that a run within a memory limit may use; none: what is free")
    cache_memory: int | None = Field(None, description="memory of the cache; none: what the students leave")


class TrainConfig(Record):
    """Every option of a run; `docs/training.md` has them in a table. ``None`` is written "none" in a file. Raises
    PpclError where the stages and their steps do not fit together (`plan_stages`).
    """

    stages: Annotated[tuple[str, ...], Flag("--stage", metavar="NAMES")] = Field(
        STAGES, description="some of depth, width, finetune, in that order"
    )
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
    weights: Weights = Field(Weights(), description="weights of the loss terms")

    @model_validator(mode="before")
    @classmethod
    def _planned(cls, given: Any) -> Any:
        """Check stages against their steps, which may be a mapping; what is of no such type is told of by its field."""
        if not isinstance(given, Mapping) or not {"stages", "steps"} & given.keys():
            return given
        stages, steps = given.get("stages", STAGES), given.get("steps", cls.model_fields["steps"].default)
        if isinstance(stages, str) or not isinstance(stages, Sequence) or not all(isinstance(s, str) for s in stages):
            return given
        counts = steps.values() if isinstance(steps, Mapping) else steps
        if isinstance(steps, Mapping | list | tuple) and all(isinstance(count, int) for count in counts):
            return {**given, "steps": plan_stages(stages, steps)[1]}
        return given

    @field_validator("log")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        """A path in a file, or in quotes, has met no shell that expands its ``~``."""
        return None if value is None else os.path.expanduser(value)

    @model_validator(mode="after")
    def _used(self) -> TrainConfig:
        if self.compile_backend != "inductor" and not self.compile:
            raise ValueError(f"compile_backend {self.compile_backend!r} has no use without compile")
        return self

    def decisive(self) -> dict[str, Any]:
        """Return the options that a resumed run must share, as JSON-able values."""
        return self.model_dump(mode="json", exclude=set(INDIFFERENT))

    def bounded(self) -> TrainConfig:
        """Return the options of a run within a memory limit, which leaves fine-tuning out where no stages are given.
        Raises PpclError where an option asks for what such a run does not do.
        """
        plain = TrainConfig()
        for name in NOT_BOUNDED:
            if getattr(self, name) != getattr(plain, name):
                raise PpclError(f"training option {name}: not with --memory-limit or --dry-run; leave it out")
        if "finetune" in self.stages and "stages" in self.model_fields_set:
            raise PpclError("stage finetune trains a whole mixture; leave it out, or train without a memory limit")
        if self.weights.attention:
            raise PpclError("the distillation graph compares no attention outputs: leave their weight at 0")
        if self.weights.relative and self.batch > 1:
            raise PpclError(
                "the relative loss is a ratio over a whole batch, and here its calls come one by one: give batch 1"
            )
        stages = tuple(name for name in self.stages if name != "finetune")
        return self.model_copy(update={"stages": stages, "steps": self.steps[: len(stages)]})


def plan_stages(
    stages: Sequence[str], steps: Sequence[int] | Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Check `stages` against the known ones and give each its number of steps, by its place in a list or by its name.
    Raises PpclError for an unknown or repeated stage, stages out of order, another number of steps than stages, and
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
        for name in steps:
            if name not in names:
                among = f"which is not among the stages {','.join(names)}"
                raise PpclError(f"steps for {name!r}{near(name, names)}, {among}")
        missing = [name for name in names if name not in steps]
        if missing:
            raise PpclError(f"no number of steps for stage {missing[0]}: add it to steps")
        steps = [steps[name] for name in names]
    counts = tuple(steps)
    if len(counts) != len(names):
        raise PpclError(f"{len(names)} stages but {len(counts)} numbers of steps: give one each for {','.join(names)}")
    for name, count in zip(names, counts, strict=True):
        if count < 1:
            raise PpclError(f"stage {name} has {count} steps: give at least 1, or leave the stage out")
    return names, counts


def resolve(config: str | Path | TrainConfig | None = None, **options: Any) -> TrainConfig:
    """Return the options of a run: those of `config` (a TOML file, or options), or the defaults, with others on top.
    Raises PpclError where the file cannot be read, or an option is unknown (the line names a near one) or makes no
    sense.

    Args:
        **options: Fields of `TrainConfig` by name; `weights` may be a mapping or a `Weights` with some or all of the
            terms, `steps` a mapping from stage to steps.
    """
    base: dict[str, Any] = {}
    if isinstance(config, TrainConfig):
        base = config.model_dump(exclude_unset=True)
    elif config is not None:
        base = _read(Path(config))
    options = {name: _plain(value) for name, value in options.items()}
    if isinstance(options.get("weights"), Mapping) and isinstance(base.get("weights"), Mapping):
        options["weights"] = {**base["weights"], **options["weights"]}
    try:
        return TrainConfig.model_validate({**base, **options})
    except ValidationError as error:
        where = "" if config is None or isinstance(config, TrainConfig) else f"{config}: "
        raise PpclError(f"{where}{_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    """Say in a line what is wrong; a name that is unknown before a value that makes no sense."""
    faults = error.errors(include_url=False)
    fault = min(faults, key=lambda one: one["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in fault["loc"])
    option = f"training option {name}: " if name else "training options: "
    if fault["type"] == "extra_forbidden":
        known = (TrainConfig if len(fault["loc"]) == 1 else Weights).model_fields
        return f"unknown training option {name!r}{near(str(fault['loc'][-1]), known)}; docs/training.md lists all"
    if fault["type"] == "value_error":
        return f"{option}{fault['ctx']['error']}; leave it out, or give another"
    return f"{option}{fault['msg'].lower()}, not {fault['input']!r}"


def _read(path: Path) -> dict[str, Any]:
    """Return the options in a TOML file by name, not checked yet."""
    written = read_text(path, TOML_BYTES)
    if max(map(len, written.split("\n"))) > LONGEST_LINE:
        raise PpclError(f"{path}: has a line of more than {LONGEST_LINE} characters; write an option a line")
    try:
        return {name: _plain(value) for name, value in tomllib.loads(written).items()}
    except (ValueError, RecursionError) as error:  # numbers of many digits, and lists in lists in lists
        raise PpclError(f"{path}: not valid TOML ({error}); mend the file") from None


def _plain(value: Any) -> Any:
    if value == NONE:
        return None
    return value.model_dump() if isinstance(value, BaseModel) else value


def save(options: TrainConfig, path: str | Path) -> None:
    """Write the complete options as a TOML file, each with its description, that `resolve` reads back to the same."""
    lines = ["# The options of `ppcl-fx train`, complete: give this file with --config to train in the same way."]
    tables: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{name}]"]
            inner = type(value).model_fields
            tables += [f"{key} = {_toml(getattr(value, key))}  # {inner[key].description}" for key in inner]
        else:
            lines.append(f"{name} = {_toml(value)}  # {field.description}")
    write_text(path, "\n".join([*lines, *tables]) + "\n")


def _toml(value: Any) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    # TOML's basic strings, booleans and integers are written as JSON's are.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
