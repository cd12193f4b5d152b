"""The loss curves of a training, one for each edit and stage, as `losses.json` keeps them for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ppcl_fx.io.files import Record, own_file, read_json, write_json
from ppcl_fx.io.reading import INDEX_BYTES

LOSSES = "losses.json"


class Stop(Record):
    """Why a student was trained no further: a line for a person, and after how many steps."""

    step: int = Field(ge=0)
    kind: Literal["converged", "nan"]
    reason: str


class StageCurves(Record, frozen=False):
    """The curves of a stage: "depth", "width" or "finetune".

    Attributes:
        label: The name in the report: the stage, and the ratio where some students are fine-tuned ("finetune-0.7").
        steps: The steps done; a curve has fewer values where its student was stopped before.
        losses: Edit id ("model" for fine-tuning) -> loss at each step: Eq. 6, Eq. 10, the mean squared velocity error.
        held_out: Edit id -> (steps done, mean loss on the held-out calls) at each evaluation.
        scores: (steps done, score) at each evaluation, where a score was asked for.
        stopped: Edit id -> why its student stopped before the others.
    """

    name: str
    label: str
    steps: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)
    losses: dict[str, list[float]] = Field(default_factory=dict)
    held_out: dict[str, list[tuple[int, float]]] = Field(default_factory=dict)
    scores: list[tuple[int, float]] = Field(default_factory=list)
    stopped: dict[str, Stop] = Field(default_factory=dict)

    def append(self, losses: dict[str, float]) -> None:
        """Add one step's loss of each edit."""
        for edit, loss in losses.items():
            self.losses.setdefault(edit, []).append(loss)
        self.steps += 1


class Losses(Record):
    """The file `losses.json`: what was trained on what, and every curve."""

    version: Literal[1] = 1
    plan: str
    calls: str
    sequential: bool
    stages: list[StageCurves]

    def save(self, path: str | Path) -> None:
        """Write the curves to `path`, keeping those of stages that an earlier run of the same plan left there."""
        kept: list[StageCurves] = []
        if (path := Path(path)).is_file():
            before = Losses.open(own_file(path))
            ours = {stage.label for stage in self.stages}
            same = (before.plan, before.calls, before.sequential) == (self.plan, self.calls, self.sequential)
            kept = [stage for stage in before.stages if stage.label not in ours] if same else []
        write_json(path, self.model_copy(update={"stages": kept + self.stages}))

    @classmethod
    def open(cls, path: Path) -> Losses:
        """Read `losses.json`. Raises PpclError where it is missing or damaged."""
        return read_json(path, cls, INDEX_BYTES)
