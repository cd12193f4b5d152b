"""From a student's graph to one that can leave PyTorch: no guards, no complex numbers, positions as inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import draft
from ppcl_fx.passes.contract import Pass, Pipeline, Result
from ppcl_fx.passes.lowering.clamp_half import ClampHalf
from ppcl_fx.passes.lowering.complex_to_real import ComplexToReal
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.positions import PositionsAsInputs, tables
from ppcl_fx.passes.lowering.tuples_apart import TuplesApart
from ppcl_fx.tracing.guards import guards


@dataclass(frozen=True)
class DropGuards(Pass, name="drop-guards", kind="rewrite", numerics="exact"):
    """Erase every guard. What they protect must be checked otherwise: export runs the file on other shapes."""

    def apply(self, gm: GraphModule) -> Result:
        found = guards(gm)
        for node in found:
            gm.graph.erase_node(node)
        return Result(gm, bool(found))

    def ensures(self, result: Result) -> None:
        if guards(result.graph_module):
            raise RuntimeError("drop-guards left a guard in the graph")


LOWERING = Pipeline(
    (
        TuplesApart(),
        PositionsAsInputs(),
        DropGuards(),
        Expand("complex"),
        DropGuards(),
        TuplesApart(),
        DeadCode(sinks=False),
        ComplexToReal(),
        DeadCode(sinks=False),
        ClampHalf(),
    )
)
"""What `lower` runs, in order. Every pass is exact; the last one is so for what float16 holds."""


@dataclass(frozen=True)
class Lowered:
    """A graph ready for export.

    Attributes:
        graph: takes tensors only, by the names in `inputs`, and holds no complex value and no guard.
        inputs: the names of its inputs, in order: those tensors of the call that are used, then position tables.
    """

    graph: GraphModule
    inputs: tuple[str, ...]

    def feeds(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the inputs for one call, given the arguments of the graph as it was before lowering."""
        known = {**kwargs, **tables(self.graph, kwargs)}
        return {name: known[name] for name in self.inputs}


def lower(gm: GraphModule) -> Lowered:
    """Lower a copy of a graph; the weights stay shared, the original stays as it is.

    Args:
        gm: a traced graph in which nodes carry their examples (``node.meta["val"]``).

    Raises:
        PpclError: the graph holds something that cannot leave PyTorch; the message names the nodes.
    """
    result = LOWERING(draft(gm))
    if result.refused:
        first = result.refused[0]
        raise PpclError(
            f"the model cannot be exported: {first.reason} (pass {first.edit}, at {', '.join(first.nodes[:4])}); "
            "export a model without it"
        )
    graph = result.graph_module
    for node in [n for n in graph.graph.nodes if n.op == "placeholder" and not n.users]:
        graph.graph.erase_node(node)
    graph.recompile()
    return Lowered(graph, tuple(str(n.target) for n in graph.graph.nodes if n.op == "placeholder"))
