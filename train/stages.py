"""What a stage trains and how it gets its gradients: distillation edit by edit, or fine-tuning of one whole
mixture.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from ppcl_fx.errors import PpclError
from ppcl_fx.graphs import module_paths
from ppcl_fx.passes.distil import distil, pairs
from ppcl_fx.passes.liveness import owner
from ppcl_fx.passes.outline import outline
from ppcl_fx.train.executor import Distiller, Groups, Saving, casting, inputs
from ppcl_fx.train.losses import Weights, output_loss

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel

WHOLE = "model"
"""The name that fine-tuning's single curve and parameter group go by."""


class Stage(Protocol):
    """One stage of training."""

    groups: Groups
    """Edit id -> the parameters that train for it."""

    def step(self, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Add one batch's gradients to the parameters' `.grad` and return each edit's loss, detached."""

    def updated(self, step: int) -> None:
        """Called after the optimiser's update number `step` (from 0)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of this stage, beside the students and the optimiser."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `tensors` returned; other names are left alone."""


class Distillation:
    """Stage "depth" (Eq. 6 and 7) or "width" (Eq. 10 to 12): each edit's students learn from the teacher's
    states.

    Args:
        model: Its students train in place.
        name: "depth" or "width".
        weights: The weights of the loss terms.
        sequential: Feed each student what the student before it gives, not what the teacher gives (the
            paper's control).
        checkpointing: Recompute the students' insides in the backward pass instead of keeping them.
        autocast: The dtype of matrix products, or None.
    """

    def __init__(
        self,
        model: PluggableModel,
        name: str,
        weights: Weights,
        *,
        sequential: bool = False,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        graph = distil(model, name, sequential=sequential)
        if weights.attention and not any(term.startswith("attention.") for term in terms(graph)):
            raise PpclError("the distillation graph compares no attention outputs: leave their weight at 0")
        if checkpointing and name == "depth":
            outline_students(graph)
        self._distiller = Distiller(
            graph, weights, joint=sequential, checkpointing=checkpointing, autocast=autocast
        )
        self.groups = self._distiller.groups

    def step(self, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Stage`."""
        return self._distiller.step(kwargs)

    def updated(self, step: int) -> None:
        """Nothing to do: the students were updated in place."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the students are in every checkpoint."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to set."""


class FineTuning:
    """Stage "finetune": a copy of one mixture, all of its parameters, learns the teacher's output on the same
    calls.

    The loss is the mean squared error of the predicted velocity. The pluggable model is left as it is.

    Args:
        model: The pluggable model; its plugged mixture is the same afterwards.
        students: The edits of the mixture to fine-tune.
        ema: Decay of an exponential moving average of the weights, which then is the result; None for the
            last weights.
        checkpointing: Recompute the blocks' insides in the backward pass instead of keeping them.
        autocast: The dtype of matrix products, or None.
    """

    def __init__(
        self,
        model: PluggableModel,
        students: Sequence[str],
        *,
        ema: float | None = None,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._teacher = mixture(model, ())
        self.student = copy.deepcopy(mixture(model, students)).requires_grad_(True)
        # The blocks as modules of their own, over the same parameters: what gradient checkpointing works on.
        view = segmented(self.student) if checkpointing else self.student
        self._runner = Saving(view, checkpointing=checkpointing)
        self._autocast = autocast
        self._device = model.device
        self._decay = ema
        start = self.student.named_parameters() if ema is not None else ()
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in start}
        self.groups: Groups = {WHOLE: list(self.student.parameters())}

    def step(self, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Stage`."""
        with casting(self._device, self._autocast):
            with torch.no_grad():
                target = prediction(self._teacher(*inputs(self._teacher, kwargs)))
            velocity = prediction(self._runner.run(*inputs(self.student, kwargs)))
        loss = output_loss(velocity, target)
        torch.autograd.backward(loss)
        return {WHOLE: loss.detach()}

    def updated(self, step: int) -> None:
        """Move the average towards the new weights; faster at first, or it would stay at the start."""
        if self._decay is None:
            return
        share = 1.0 - min(self._decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                self._average[name].lerp_(parameter.float(), share)

    def result(self) -> GraphModule:
        """Return the fine-tuned model, not training any more, with the averaged weights if there are any."""
        with torch.no_grad():
            for name, value in self._average.items():
                self.student.get_parameter(name).copy_(value)
        return self.student.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """The copy's parameters and their average."""
        return {f"{prefix}.{name}": value for prefix, name, value in self._stored()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the copy's parameters and their average."""
        with torch.no_grad():
            for prefix, name, value in self._stored():
                value.copy_(tensors[f"{prefix}.{name}"])

    def _stored(self) -> list[tuple[str, str, Tensor]]:
        weights = [("finetune", name, p) for name, p in self.student.named_parameters()]
        return weights + [("average", name, value) for name, value in self._average.items()]


def terms(gm: GraphModule) -> set[str]:
    """Return the names of the loss terms in a distillation graph."""
    found = (node.args[1] for node in gm.graph.nodes if node.op == "call_function" and node.target is pairs)
    return {str(term[0]) for group in found if isinstance(group, tuple) for term in group}


def outline_students(gm: GraphModule) -> None:
    """Make each student block of a distillation graph one module, in place: what gradient checkpointing works
    on.
    """
    regions: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        for path in module_paths(node)[:1]:
            if path.startswith("students."):
                regions.setdefault(path, []).append(node)
    for path, nodes in regions.items():
        outline(gm, path, nodes)
    gm.recompile()


def segmented(gm: GraphModule) -> GraphModule:
    """Return the graph cut into modules, one from each block's first node to the next block's: the same
    parameters.

    Blocks are cut along the order of the nodes and not outlined, since a projector may stand between their
    nodes.
    """
    number, current = 0, ""
    part: dict[Node, int] = {}
    for node in gm.graph.nodes:
        block = owner(node)
        if block and block != current:
            number, current = number + 1, block
        part[node] = number
    return split_module(gm, gm, lambda node: part[node])


def mixture(model: PluggableModel, students: Sequence[str]) -> GraphModule:
    """Return the plain graph of `model` with `students` plugged in, its parameters shared, and plug back what
    was.
    """
    before = tuple(model.students)
    try:
        return model.plug(students=list(students)).graph_module()
    finally:
        model.plug(students=list(before))


def prediction(output: Any) -> Tensor:
    """Return the predicted velocity: a transformer's output, or the first element of the tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise RuntimeError(f"the model returned a {type(first).__name__}, not a tensor")
    return first
