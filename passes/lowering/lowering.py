"""From a student's graph to one that can leave PyTorch: no guards, no complex numbers, positions as inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import draft
from ppcl_fx.ir.liveness import owner
from ppcl_fx.passes.contract import Pass, Pipeline, Result
from ppcl_fx.passes.lowering.complex_to_real import ComplexToReal
from ppcl_fx.passes.lowering.dead_code import DeadCode
from ppcl_fx.passes.lowering.einsum import EinsumToPermute
from ppcl_fx.passes.lowering.expand import Expand
from ppcl_fx.passes.lowering.positions import Form, PositionsAsInputs, tables
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


END = float(torch.finfo(torch.float16).max)
"""The largest value of float16, 65504."""


@dataclass(frozen=True)
class ClampHalf(Pass, name="clamp-half", kind="rewrite", numerics="approximate"):
    """Clamp each float16 tensor that leaves a block to ±65504.

    Finite values stay as they are, to the bit; an infinity becomes the largest number, and so no NaN comes of it in the
    next norm. That this never happens on recorded calls is shown elsewhere (`ppcl_fx.export.onnx.half.check_range`).
    """

    def apply(self, gm: GraphModule) -> Result:
        found = [node for node in gm.graph.nodes if _leaves_block(node) and not _clamps(node)]
        for node in found:
            with gm.graph.inserting_after(node):
                clamped = gm.graph.call_function(torch.clamp, (node, -END, END))
            clamped.meta = dict(node.meta)
            node.replace_all_uses_with(clamped, delete_user_cb=lambda user, own=clamped: user is not own)
        return Result(gm, bool(found))


def _leaves_block(node: Node) -> bool:
    value, home = node.meta.get("val"), owner(node)
    half = isinstance(value, torch.Tensor) and value.dtype == torch.float16
    return half and home != "" and any(owner(user) != home for user in node.users)


def _clamps(node: Node) -> bool:
    return node.target is torch.clamp and node.args[1:] == (-END, END)


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
        EinsumToPermute(),
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


def lower(gm: GraphModule, form: Form = "tables") -> Lowered:
    """Lower a copy of a graph; the weights stay shared, the original stays as it is.

    Args:
        gm: a traced graph in which nodes carry their examples (``node.meta["val"]``).
        form: as `PositionsAsInputs` takes it.

    Raises:
        PpclError: the graph holds something that cannot leave PyTorch; the message names the nodes.
    """
    passes = [PositionsAsInputs(form) if isinstance(one, PositionsAsInputs) else one for one in LOWERING.passes]
    result = Pipeline(passes)(draft(gm))
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
