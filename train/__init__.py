"""Training: what makes the students good.

`train` runs the stages: "depth" and "width" distil each edit's students from the teacher's own states, edit
by edit, "finetune" trains one whole mixture on the teacher's output. `load_finetuned` reads its result back.
`measure_effects` and `predicted_and_measured` say what each student does to the output.
Names are imported when they are first used, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.model.student_folder import load_finetuned
    from ppcl_fx.schema.curves import Losses, StageCurves
    from ppcl_fx.train.config import STAGES, Limits, TrainConfig, Weights
    from ppcl_fx.train.metrics.effects import measure_effects, predicted_and_measured
    from ppcl_fx.train.run import TrainResult, train

_HOME = {
    "ppcl_fx.model.student_folder": ("load_finetuned",),
    "ppcl_fx.schema.curves": ("Losses", "StageCurves"),
    "ppcl_fx.train.config": ("STAGES", "Limits", "TrainConfig", "Weights"),
    "ppcl_fx.train.metrics.effects": ("measure_effects", "predicted_and_measured"),
    "ppcl_fx.train.run": ("TrainResult", "train"),
}
"""The names of each module."""

__all__ = [
    "STAGES",
    "Limits",
    "Losses",
    "StageCurves",
    "TrainConfig",
    "TrainResult",
    "Weights",
    "load_finetuned",
    "measure_effects",
    "predicted_and_measured",
    "train",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOME)
