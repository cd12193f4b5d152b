"""The score of the shipped model's pictures, as a callback of the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.tracing import bind

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel


class _Plain(nn.Module):
    """A graph that a pipeline asks for its configuration, dtype and device."""

    def __init__(self, graph: GraphModule, own: Any) -> None:
        super().__init__()
        self.graph = graph
        self.config, self.dtype, self.device = own.config, own.dtype, own.device

    def forward(self, **kwargs: Any) -> Any:
        """Call the graph with a transformer's keyword arguments."""
        return self.graph(**bind(self.graph, kwargs))


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
        pipeline.transformer = _Plain(whole, own) if stage == "finetune" else whole
        try:
            return score(pipeline, count)["overall"]
        finally:
            pipeline.transformer = own

    return scored
