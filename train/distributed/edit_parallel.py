"""Interval parallelism: each rank trains some of a stage's edits, and runs the teacher as far as these need it.

No gradient is ever sent, only an edit's loss and gradient norm: with non-sequential distillation (Sec. 3.3) every edit
is a problem of its own, so the students come out the same, to the bit, as those of one process.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.ir.graphs import ancestors
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.tracing.leaves import has_attention
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.batches import moved
from ppcl_fx.train.core.distillation_graph import distil, pairs
from ppcl_fx.train.core.distiller import Groups, edit_parameters, live_nodes
from ppcl_fx.train.core.stages import Compute, Distillation, Stage
from ppcl_fx.train.distributed.process_group import ProcessGroup

BACKWARD = 3  # cost of a node that trains, forward and backward, over that of its forward pass alone
_log = logging.getLogger("ppcl_fx.train")


class EditParallel(Stage):
    """Stage "depth" or "width", of which this rank trains its share of the edits.

    Where there are more ranks than edits, the spare ones have nothing to do. Every rank has all of the model, and
    moves what its share needs to its device. In `groups` the edits of other ranks have no parameters; which edits
    there are is the same on all ranks, so that all decide alike. `whole` has all parameters of all edits, `owners` the
    rank that trains each.
    """

    separate = True

    def __init__(
        self, model: PluggableModel, name: str, weights: Weights, ranks: ProcessGroup, compute: Compute | None = None
    ) -> None:
        graph = distil(model, name, attention=weights.attention != 0.0)
        self.whole: Groups = edit_parameters(graph)
        shares = assign(graph, ranks.world)
        self.owners = {edit: rank for rank, share in enumerate(shares) for edit in share}
        if ranks.first and len(shares) < ranks.world:
            told = "stage %s has %d students for %d ranks: the last %d have nothing to do in it"
            _log.warning(told, name, len(shares), ranks.world, ranks.world - len(shares))
        self._ranks, self._home, self._device = ranks, model.device, ranks.device or model.device
        self._edits = list(self.whole)
        self._stage: Distillation | None = None
        if ranks.rank < len(shares):
            self._stage = Distillation(model, name, weights, only=shares[ranks.rank], compute=compute)
            self._stage.move(self._device)
        self.groups: Groups = {}
        self._regroup(self._edits)

    def losses(self, kwargs: Mapping[str, Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`: gradients for this rank's edits, the losses of all. Raises PpclError where a rank is lost."""
        busy = self._stage if self._stage is not None and self._stage.groups else None
        return self._everyones({} if busy is None else busy.losses(moved(kwargs, self._device), target, scale))

    def norms(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Stage`: all ranks know all of them, so that all stop an edit whose gradient is not finite."""
        return self._everyones({edit: norm for edit, norm in mine.items() if self.groups[edit]})

    def stop(self, edit: str) -> None:
        """See `Stage`; called for every edit on every rank."""
        if self._stage is not None and edit in self._stage.groups:
            self._stage.stop(edit)
        self._regroup([other for other in self.groups if other != edit])

    def share(self) -> None:
        """Give every rank all the students, as their owners trained them: the end of the stage."""
        if self._stage is not None:
            self._stage.move(self._home)
        for edit, parameters in self.whole.items():
            for parameter in parameters:
                self._ranks.broadcast(parameter, self.owners[edit])

    def _regroup(self, edits: Sequence[str]) -> None:
        mine = {} if self._stage is None else self._stage.groups
        self.groups = {edit: mine.get(edit, []) for edit in edits}

    def _everyones(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        row = torch.zeros(len(self._edits))
        for edit, loss in losses.items():
            row[self._edits.index(edit)] = loss
        found = dict(zip(self._edits, self._ranks.sum(row), strict=True))
        return {edit: loss for edit, loss in found.items() if edit in self.groups}


def assign(graph: GraphModule, world: int) -> list[list[str]]:
    """Divide a distillation graph's edits over ranks, so that the costliest share costs as little as possible.

    A share costs what its students cost, and the teacher's pass as far as the last of them needs it. So a share is
    a run of consecutive edits, and the first ones, whose teacher is short, hold more students. Among all such
    divisions the best is found. There are as many shares as ranks, or as edits where these are fewer.
    """
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is pairs]
    edits = [str(node.args[0]) for node in nodes]
    needs = [ancestors([node]) for node in nodes]
    costs = _costs(graph, needs)
    table = {
        (begin, end): sum(costs[node] for node in needed)
        for begin in range(len(needs))
        for end, needed in enumerate(itertools.accumulate(needs[begin:], operator.or_), start=begin + 1)
    }
    # best[j]: how to divide the first j edits among the shares so far: the largest cost, and where the last begins.
    never: tuple[float, list[int]] = (float("inf"), [])
    best: list[tuple[float, list[int]]] = [(0.0, []), *[never] * len(edits)]
    for _ in range(min(world, len(edits))):
        following = [never]
        for end in range(1, len(edits) + 1):
            choices = [(max(best[b][0], table[b, end]), [*best[b][1], b]) for b in range(end)]
            following.append(min(choices))
        best = following
    begins = [*best[-1][1], len(edits)]
    return [edits[low:high] for low, high in itertools.pairwise(begins)]


def division_cost(graph: GraphModule, shares: Sequence[Sequence[str]]) -> float:
    """Return what a step of the costliest of some shares costs, in the units of `node_cost`."""
    nodes = {str(n.args[0]): n for n in graph.graph.nodes if n.op == "call_function" and n.target is pairs}
    needs = [ancestors([nodes[edit] for edit in share]) for share in shares]
    costs = _costs(graph, needs)
    return max(sum(costs[node] for node in needed) for needed in needs)


def _costs(graph: GraphModule, needs: Sequence[set[Node]]) -> dict[Node, float]:
    live = live_nodes(graph)
    return {node: node_cost(graph, node) * (BACKWARD if node in live else 1) for node in set[Node]().union(*needs)}


def node_cost(graph: GraphModule, node: Node) -> float:
    """Return about how many multiplications a node's forward pass takes, from the shapes of the traced example.

    Every weight of a matrix meets every token once, and in attention every token meets every other.
    """
    value = node.meta.get("val")
    if node.op != "call_module":
        return float(value.numel()) if isinstance(value, Tensor) and node.op.startswith("call") else 0.0
    module = graph.get_submodule(str(node.target))
    given = (source.meta.get("val") for source in node.all_input_nodes)
    shapes = [tensor.shape for tensor in given if isinstance(tensor, Tensor) and tensor.ndim]
    rows = max((t[:-1].numel() for t in shapes), default=1)
    cost = float(rows * sum(p.numel() for p in module.parameters() if p.ndim > 1))
    if has_attention(module):
        sequences = [shape for shape in shapes if len(shape) == 3]
        tokens = sum(shape[1] for shape in sequences)
        cost += 2.0 * tokens**2 * max((shape[0] * shape[2] for shape in sequences), default=0)
    return cost
