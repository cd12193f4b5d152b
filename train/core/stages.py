"""What a stage trains and how it gets its gradients: distillation edit by edit, or fine-tuning of one mixture."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.partition import regions, segmented
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.retrace import over
from ppcl_fx.passes.edits.outline import outline
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.batches import Batches
from ppcl_fx.train.core.distillation_graph import distil, loss_nodes
from ppcl_fx.train.core.distiller import Distiller, Groups, Saving, casting, inputs, without_edit
from ppcl_fx.train.core.losses import output_loss

CHECKED = 8
"""Kinds of batches whose recorded outputs are compared with the teacher's."""
WHOLE = "model"
"""The name that fine-tuning's single curve and parameter group go by."""


@dataclass(frozen=True)
class Compute:
    """How a stage computes."""

    checkpointing: bool = False  # recompute the insides of blocks in the backward pass instead of keeping them
    autocast: torch.dtype | None = None  # dtype of matrix products
    backend: str | None = None  # `torch.compile`'s for the blocks that train; None not to compile them


class Stage:
    """One stage of training."""

    groups: Groups
    """Edit id -> the parameters that train for it; those of stopped edits are gone."""

    separate = False
    """Whether each edit's loss and gradients are its own, so that one can stop while the others go on."""

    def losses(self, batch: Any, target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """Return each edit's loss on one batch, detached; add its gradients, times `scale`, to the parameters' `.grad`,
        but for a scale of None. `target` is the teacher's recorded output, where that is to be used.
        """
        raise NotImplementedError

    def step(self, batch: Any, *, target: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        """Return the losses and add gradients: see `losses`."""
        return self.losses(batch, target, scale)

    def evaluate(self, batch: Any, *, target: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses alone: see `losses`."""
        return self.losses(batch, target, None)

    def norms(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every edit's gradient norm, given those of the parameters in `groups`."""
        return mine

    def stop(self, edit: str) -> None:
        """Train `edit` no further; what only its loss needed is computed no more."""
        for parameter in self.groups[edit]:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.groups = {other: parameters for other, parameters in self.groups.items() if other != edit}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of this stage, beside the students and the optimiser; it is overwritten
        with what a checkpoint held.
        """
        return {}


class Distillation(Stage):
    """Stage "depth" (Eq. 6 and 7) or "width" (Eq. 10 to 12): each edit's students learn from the teacher's states.

    The model's students train in place, of all edits of the stage or `only` of some. `sequential` feeds each student
    what the student before it gives, not what the teacher gives (the paper's control).
    """

    def __init__(
        self,
        model: PluggableModel,
        name: str,
        weights: Weights,
        *,
        sequential: bool = False,
        only: Collection[str] | None = None,
        compute: Compute | None = None,
    ) -> None:
        self._model, self._name, self._weights = model, name, weights
        self._only, self._compute = only, compute or Compute()
        self.separate = not sequential
        self._stopped: list[str] = []
        self._distillers: dict[GraphModule, Distiller] = {}
        first = self._distiller(model.graph)
        self.groups = first.groups
        compared = any(term.startswith("attention.") for term in terms(first.gm))
        if name == "depth" and weights.attention and not compared:
            raise PpclError("the distillation graph compares no attention outputs: leave their weight at 0")

    def _distiller(self, kind: GraphModule) -> Distiller:
        """Return what runs the distillation graph for one kind of call."""
        if kind not in self._distillers:
            attention = self._weights.attention != 0.0
            graph = distil(self._model, self._name, not self.separate, attention, self._only, kind)
            compute = self._compute
            outlined = (compute.checkpointing or compute.backend) and self._name == "depth"
            blocks = outline_students(graph) if outlined else []
            for block in blocks if compute.backend else []:
                block.compile(backend=compute.backend)
            for edit in self._stopped:
                without_edit(graph, edit)
            self._distillers[kind] = self._runs(graph)
        return self._distillers[kind]

    def _runs(self, graph: GraphModule) -> Distiller:
        joint, compute = not self.separate, self._compute
        checkpointing, autocast = compute.checkpointing, compute.autocast
        return Distiller(graph, self._weights, joint=joint, checkpointing=checkpointing, autocast=autocast)

    def losses(self, kwargs: Mapping[str, Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`; the students' targets are the teacher's states, computed on the way."""
        return self._distiller(self._model.graph_for(kwargs)).step(kwargs, scale)

    def stop(self, edit: str) -> None:
        """See `Stage`. The teacher's blocks after the last student that still trains are not run any more."""
        super().stop(edit)
        self._stopped.append(edit)
        for kind, distiller in self._distillers.items():
            without_edit(distiller.gm, edit)
            self._distillers[kind] = self._runs(distiller.gm)
        self.groups = self._distiller(self._model.graph).groups

    def move(self, device: torch.device) -> None:
        """Move what the stage computes with, of the teacher and of the students, to `device`."""
        for distiller in self._distillers.values():
            distiller.gm.to(device)


class FineTuning(Stage):
    """Stage "finetune": a copy of one mixture, all of its parameters, learns the teacher's output on the same calls.

    The loss is the mean squared error of the predicted velocity. The pluggable model is left as it is.
    """

    def __init__(self, model: PluggableModel, students: Sequence[str], compute: Compute | None = None) -> None:
        self._model, self._students, self._compute = model, list(students), compute or Compute()
        self.student = copy.deepcopy(mixture(model, students)).requires_grad_(True)
        self._runners: dict[GraphModule, tuple[GraphModule, Saving, GraphModule]] = {}
        self._device = model.device
        self.groups: Groups = {WHOLE: list(self.student.parameters())}

    def losses(self, kwargs: Mapping[str, Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`. Without a `target` the teacher computes it."""
        with torch.set_grad_enabled(scale is not None):
            loss = self._loss(kwargs, target)
        if scale is not None:
            torch.autograd.backward(loss * scale)
        return {WHOLE: loss.detach()}

    def target(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's output for a batch, as this stage computes it."""
        teacher = self._teacher_for(kwargs)
        with casting(self._device, self._compute.autocast), torch.no_grad():
            return prediction(teacher(*inputs(teacher, kwargs)))

    def gives(self, batches: Batches) -> bool:
        """Tell whether the recorded outputs are, to the bit, what the teacher gives here.

        One batch of each kind (shapes, and number of calls) is compared, the same ones whenever this is asked, so that
        a resumed run decides as the first one did. Other precision, autocast or another machine may round differently;
        so may several calls in one batch.
        """
        seen: set[tuple[int, ...]] = set()
        for step in range(len(batches)):
            target = batches.target(step)
            if target is None:
                return False
            kind = (len(batches.indices(step)), *target.shape)
            if kind in seen or len(seen) >= CHECKED:
                continue
            seen.add(kind)
            computed = self.target(batches.kwargs(step))
            if computed.dtype != target.dtype or not torch.equal(computed, target):
                return False
        return True

    def _teacher_for(self, kwargs: Mapping[str, Any]) -> GraphModule:
        """Return the teacher for one kind of call."""
        return self._for(kwargs)[2]

    def _for(self, kwargs: Mapping[str, Any]) -> tuple[GraphModule, Saving, GraphModule]:
        """Return the student for one kind of call, what runs it, and the teacher."""
        kind = self._model.graph_for(kwargs)
        if kind not in self._runners:
            student = self.student
            if kind is not self._model.graph:
                student = over(self.student, plugged(kind, frozenset(self._students)))
            # The blocks as modules of their own, over the same parameters: what gradient checkpointing works on.
            compute = self._compute
            view = segmented(student) if compute.checkpointing or compute.backend else student
            for block in view.children() if compute.backend else ():
                block.compile(backend=compute.backend)
            runner = Saving(view, checkpointing=compute.checkpointing)
            self._runners[kind] = (student, runner, plugged(kind, frozenset()))
        return self._runners[kind]

    def _loss(self, kwargs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        wanted = self.target(kwargs) if target is None else target
        student, runner, _ = self._for(kwargs)
        with casting(self._device, self._compute.autocast):
            velocity = prediction(runner.run(*inputs(student, kwargs)))
        return output_loss(velocity, wanted)

    def result(self) -> GraphModule | None:
        """Return the fine-tuned model, not training any more; of several ranks' one, None on all but the first."""
        return self.student.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """The copy's parameters."""
        return {f"finetune.{name}": value for name, value in self.student.named_parameters()}


def terms(gm: GraphModule) -> set[str]:
    """Return the names of the loss terms in a distillation graph."""
    groups = [node.args[1] for node in loss_nodes(gm)]
    return {str(term[0]) for group in groups if isinstance(group, tuple) for term in group}


def outline_students(gm: GraphModule) -> list[Module]:
    """Make each student block of a distillation graph one module, in place, and return them: what gradient
    checkpointing and compilation work on.
    """
    students = {path: nodes for path, nodes in regions(gm).items() if path.startswith("students.")}
    for path, nodes in students.items():
        outline(gm, path, nodes)
    gm.recompile()
    return [gm.get_submodule(path) for path in students]


def prediction(output: Any) -> Tensor:
    """Return the predicted velocity: a transformer's output, or the first element of the tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise RuntimeError(f"the model returned a {type(first).__name__}, not a tensor")
    return first
