"""One edit's student with its weights in memory: a stage of its own, from the teacher's values to a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.train.bounded.problems import Problem
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core.distiller import Distiller
from ppcl_fx.train.core.stages import Stage, outline_students


class Student(Stage):
    """A problem with its weights in memory: a `ppcl_fx.train.core.stages.Stage` on the values at its border.

    The problem's own parameters stay on the meta device; `read` gives weights by name. `depth` says whether it is a
    student block, which gradient checkpointing works on. `tensors_by_name` is what trains, by its name in the
    students' file.
    """

    separate = True

    def __init__(
        self, problem: Problem, read: Callable[[str], Tensor], config: TrainConfig, depth: bool, device: torch.device
    ) -> None:
        self.problem = problem
        graph = copy.deepcopy(problem.graph)
        for name in (*problem.trained, *problem.frozen):
            path, _, leaf = name.rpartition(".")
            owner, trains = graph.get_submodule(path), name in problem.trained
            own: Tensor = getattr(owner, leaf)
            try:
                tensor = read(name).to(own.dtype)
            except KeyError:
                if own.is_meta:
                    raise RuntimeError(f"no file holds {name}") from None
                tensor = own.detach()
            # What trains is copied, or the update would go to a page of the file.
            tensor = tensor.to(device, copy=trains)
            setattr(owner, leaf, Parameter(tensor, requires_grad=trains) if isinstance(own, Parameter) else tensor)
        self.tensors_by_name: dict[str, Tensor] = {name: graph.get_parameter(name) for name in problem.trained}
        if config.checkpointing and depth:
            outline_students(graph)
        cast = torch.bfloat16 if config.autocast else None
        self._distiller = Distiller(graph, config.weights, checkpointing=config.checkpointing, autocast=cast)
        self.groups = self._distiller.groups

    def losses(self, border: Sequence[Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`; the students' targets are among the border's values."""
        return self._distiller.step(border, scale)
