"""Take the run-time guards out of a graph that is about to leave Python."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ppcl_fx.passes.contract import Pass, Result
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
