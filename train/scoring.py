"""The score of the shipped model's pictures, as a callback of the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.model import PluggableModel
from ppcl_fx.plan import Plan


def shapes_score(model: PluggableModel, count: int) -> Callable[[str, Any], float]:
    """Return a callback that draws `count` pictures a category with the model so far and returns their overall score.

    Raises:
        PpclError: The model's teacher is not the shapes model that ships with the package.
    """
    from ppcl_fx.fingerprint import fingerprint
    from ppcl_fx.shapes import load_pipeline
    from ppcl_fx.shapes.score import score

    pipeline = load_pipeline(model.dtype)
    own = pipeline.transformer
    if model.plan.model and fingerprint(own) != model.plan.model:
        raise PpclError(
            "training option score_prompts: only students of the shipped 'shapes' model have a score; set it to 0"
        )
    pipeline.set_progress_bar_config(disable=True)

    def scored(stage: str, whole: Any) -> float:
        pipeline.transformer = PluggableModel(whole, Plan()) if stage == "finetune" else whole
        try:
            return score(pipeline, count)["overall"]
        finally:
            pipeline.transformer = own

    return scored
