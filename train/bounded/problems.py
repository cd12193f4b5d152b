"""The problems that a stage falls into: each a small graph of its own, from cached teacher values to a loss; and the
students, which are problems with their weights in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.ir.partition import carve
from ppcl_fx.passes.calibration.memory_estimate import value_bytes
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core.distillation_graph import ORIGIN, distil, loss_nodes
from ppcl_fx.train.core.distiller import Distiller, live_nodes
from ppcl_fx.train.core.stages import Stage, outline_students

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel


@dataclass(frozen=True, eq=False)
class Problem:
    """One edit: what trains alone."""

    number: int  # its position in the stage, from 0
    edit: str
    graph: GraphModule  # a distillation graph whose placeholders are the border; no teacher before it is left
    border: tuple[str, ...]  # nodes of the pluggable graph whose values it starts from and aims at, as the placeholders
    trained: tuple[str, ...]  # names of the tensors that it trains
    frozen: tuple[str, ...]  # names of the teacher's tensors that it computes with


def problems(model: PluggableModel, stage: str) -> list[Problem]:
    """Cut a stage's distillation graph in problems.

    An interval's student needs the teacher's values where it begins and where it ends, and nothing else of the
    teacher (Eq. 6: the losses do not see each other). Only the students have `requires_grad`; the meta device will
    do. Raises PpclError as `distil` does.
    """
    gm = distil(model, stage)
    live = live_nodes(gm)
    sides = [(end, student_side(gm, ancestors([end], within=live))) for end in loss_nodes(gm)]
    return [_problem(gm, number, end, side) for number, (end, side) in enumerate(sides)]


def student_side(gm: GraphModule, live: set[Node]) -> set[Node]:
    """Return the nodes of a distillation graph to run while training; what they read of the others is cached.

    Those are the `live` ones, which a trained weight of the problem comes before and which lead to its loss. A node
    without weights before them joins (a norm of the block's input) where that leaves fewer bytes to cache than its
    value has.
    """
    side = set(live)
    for node in reversed(gm.graph.nodes):
        if node in side or not any(user in side for user in node.users):
            continue
        if node.op == "get_attr" or ORIGIN not in node.meta:
            # A constant is at hand; a value behind another edit's student is not in the pluggable graph.
            side.add(node)
        elif node.op != "placeholder" and not node.is_impure() and not _has_tensors(gm, node):
            new = [source for source in node.all_input_nodes if not any(user in side for user in source.users)]
            if not new or sum(_size(source) for source in new) < _size(node):
                side.add(node)
    return side


def _size(node: Node) -> int:
    """Bytes of a value; a number counts as one, since it has to be kept too."""
    return value_bytes(node.meta.get("val")) or 1


def _has_tensors(gm: GraphModule, node: Node) -> bool:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _problem(gm: GraphModule, number: int, end: Node, nodes: set[Node]) -> Problem:
    carved = carve([node for node in gm.graph.nodes if node in nodes])
    carved.graph.output(None)
    made = GraphModule(gm, carved.graph, class_name="Problem")
    made.meta = dict(gm.meta)
    parameters = dict(made.named_parameters())
    trained = tuple(name for name, p in parameters.items() if p.requires_grad)
    others = [*parameters, *(name for name, _ in made.named_buffers())]
    border = tuple(str(node.meta[ORIGIN]) for node in carved.inputs)
    frozen = tuple(name for name in others if name not in set(trained))
    return Problem(number, str(end.args[0]), made, border, trained, frozen)


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
            setattr(
                owner, leaf, nn.Parameter(tensor, requires_grad=trains) if isinstance(own, nn.Parameter) else tensor
            )
        self.tensors_by_name: dict[str, Tensor] = {name: graph.get_parameter(name) for name in problem.trained}
        if config.checkpointing and depth:
            outline_students(graph)
        cast = torch.bfloat16 if config.autocast else None
        self._distiller = Distiller(graph, config.weights, checkpointing=config.checkpointing, autocast=cast)
        self.groups = self._distiller.groups

    def losses(self, border: Sequence[Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`; the students' targets are among the border's values."""
        return self._distiller.step(border, scale)
