"""The loss curves of a training, one for each edit and stage, as `losses.json` keeps them for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ppcl_fx.io.files import own_file, read_json, write_json
from ppcl_fx.io.reading import INDEX_BYTES

LOSSES = "losses.json"


class Stop(BaseModel):
    """Why a student was trained no further: a line for a person, and after how many steps."""

    model_config = ConfigDict(extra="forbid")
    step: int = Field(ge=0)
    kind: Literal["converged", "nan"]
    reason: str


class StageCurves(BaseModel):
    """One stage's curves.

    Attributes:
        name: The stage: "depth", "width" or "finetune".
        label: The name in the report: the stage, and for fine-tuning of part of the students the ratio
            ("finetune-0.7").
        steps: The steps done; as many values as each curve has, unless its student was stopped before.
        seconds: Wall time of those steps.
        losses: Edit id -> loss at each step ("model" for fine-tuning). Eq. 6, Eq. 10 or the mean squared
            velocity error.
        held_out: Edit id -> (steps done, mean loss on the held-out calls) at each evaluation.
        scores: (steps done, score) at each evaluation, where a score was asked for.
        stopped: Edit id -> why its student stopped before the others.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    label: str
    steps: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)
    losses: dict[str, list[float]] = {}
    held_out: dict[str, list[tuple[int, float]]] = {}
    scores: list[tuple[int, float]] = []
    stopped: dict[str, Stop] = {}

    def append(self, losses: dict[str, float]) -> None:
        """Add one step's loss of each edit."""
        for edit, loss in losses.items():
            self.losses.setdefault(edit, []).append(loss)
        self.steps += 1


class Losses(BaseModel):
    """The file `losses.json`: what was trained on what, and every curve."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    plan: str
    calls: str
    sequential: bool
    stages: list[StageCurves]

    def save(self, path: Path) -> None:
        """Write the curves to `path`, keeping those of stages that an earlier run of the same plan left
        there.
        """
        kept: list[StageCurves] = []
        if path.is_file():
            before = Losses.open(own_file(path))
            ours = {stage.label for stage in self.stages}
            same = (before.plan, before.calls, before.sequential) == (self.plan, self.calls, self.sequential)
            kept = [stage for stage in before.stages if stage.label not in ours] if same else []
        write_json(path, self.model_copy(update={"stages": kept + self.stages}))

    @classmethod
    def open(cls, path: Path) -> Losses:
        """Read `losses.json`. Raises PpclError where it is missing or damaged."""
        return read_json(path, cls, INDEX_BYTES)
