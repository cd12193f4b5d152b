"""What each trained student does to the model's output, as it was measured: the file `effects.json`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import Record, own_file, read_json
from ppcl_fx.io.fingerprint import state_digest
from ppcl_fx.schema.plan import Plan, plan_digest

EFFECTS = "effects.json"
_log = logging.getLogger("ppcl_fx")


class Effect(Record):
    """The effect of an edit, by its id.

    Attributes:
        error: the sum of the squared differences of the model's output to the teacher's over the sum of the teacher's
            squares, with this edit plugged alone. With `on`, what it adds to theirs.
        on: the edits that were plugged too, because this one changes their student and nothing else.
        loss: its distillation loss on held-out calls, where training measured it.
    """

    edit: str
    error: float = Field(ge=0, allow_inf_nan=False)
    on: list[str] = Field(default_factory=list)
    loss: float | None = None


class Mixture(Record):
    """One share of the parameters: the students plugged, the sum of their effects, the mixture's own error."""

    keep: float = Field(gt=0, le=1)
    params: int = Field(gt=0)
    students: list[str]
    predicted: float = Field(ge=0, allow_inf_nan=False)
    measured: float = Field(ge=0, allow_inf_nan=False)


class Effects(Record):
    """Every edit's effect on the output of one trained model.

    Attributes:
        plan: its digest (`ppcl_fx.schema.plan.plan_digest`).
        students: digest of their weights (`ppcl_fx.io.fingerprint.state_digest`).
        calls: their fingerprint.
        measured_on: positions of the calls that it was measured on.
        edits: one entry for each edit of the plan, in its order.
    """

    version: Literal[1] = 1
    plan: str
    students: str
    calls: str
    measured_on: list[int]
    samples: int = Field(gt=0)
    edits: list[Effect]
    mixtures: list[Mixture] = Field(default_factory=list)

    @property
    def errors(self) -> dict[str, float]:
        """Edit -> its effect."""
        return {effect.edit: effect.error for effect in self.edits}

    def predicted(self, students: Collection[str]) -> float:
        """Return the sum of the effects of some edits; one whose student is not plugged changes nothing."""
        plugged = set(students)
        return sum(e.error for e in self.edits if e.edit in plugged and plugged.issuperset(e.on))


def load_effects(folder: str | Path, plan: Plan, weights: Mapping[str, torch.Tensor]) -> Effects | None:
    """Return the effects in a student folder; None where there are none, or other weights' ones (with a warning).

    Raises:
        PpclError: the file is damaged or belongs to another plan.
    """
    path = Path(folder) / EFFECTS
    if not path.exists():
        return None
    effects = read_json(own_file(path), Effects)
    if effects.plan != plan_digest(plan) or [effect.edit for effect in effects.edits] != plan.ids:
        raise PpclError(f"{path}: measured for another plan or model; remove the file, or train with --effects again")
    if effects.students != state_digest(weights):
        _log.warning("%s: measured before the students were changed, so not used; train with --effects again", path)
        return None
    return effects
