"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ppcl_fx.ir.liveness import SINK, live
from ppcl_fx.passes.contract import Pass, Result


@dataclass(frozen=True)
class DeadCode(Pass, name="dead-code", kind="rewrite", numerics="exact"):
    """Erase what nothing uses, effects of blocks that are gone included.

    Attributes:
        sinks: keep what the traced model computed without using it (and so its parameter count).
    """

    sinks: bool = True

    def apply(self, gm: GraphModule) -> Result:
        if not self.sinks:
            for node in gm.graph.nodes:
                node.meta.pop(SINK, None)
        keep = live(gm)
        dead = [node for node in gm.graph.nodes if node not in keep]
        for node in reversed(dead):
            gm.graph.erase_node(node)
        return Result(gm, bool(dead))
