"""The input adapter: a pipeline's call becomes the inputs of an exported graph, position tables among them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.ir.executor import buffers_on_meta
from ppcl_fx.ir.graphs import draft
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.lowering.positions import POSITIONS, Form, PositionsAsInputs, looks_only
from ppcl_fx.passes.lowering.tuples_apart import TuplesApart
from ppcl_fx.tracing import bind, with_rows

REMEMBERED = 8
"""For how many kinds of call the position tables are kept."""


class InputAdapter:
    """Takes a pipeline's call and gives an exported graph's inputs; `gm` is the mixture, on the meta device.

    Args:
        graph: the pluggable graph.
        students: the ids of the edits that are plugged.
        positions: the position inputs of the exported graph, as its manifest has them.

    Attributes:
        form: how those inputs are cut and named (`PositionsAsInputs`): ``nodes`` in files of earlier versions.

    Raises:
        PpclError: the model's positions cannot become inputs.
    """

    def __init__(self, graph: GraphModule, students: Sequence[str], positions: Collection[str] = ()) -> None:
        self.gm = plugged(graph, frozenset(students))
        self.form: Form = "tables"
        self._maker = self._made()
        if not {*positions} <= {*(self._maker.names if self._maker else ())}:
            self.form = "nodes"
            self._maker = self._made()
        self._known: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def _made(self) -> SizesOnly | None:
        result = Pipeline((TuplesApart(), PositionsAsInputs(self.form)))(draft(self.gm))
        if result.refused:
            raise PpclError(f"the model's positions cannot become inputs: {result.refused[0].reason}; export again")
        parted = result.graph_module
        return SizesOnly(parted) if POSITIONS in parted.meta else None

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by the names of the graph's inputs; `GuardError` where it has others."""
        named = dict(zip(graph_info(self.gm)["signature"], args, strict=False))
        try:
            return bind(self.gm, with_rows(self.gm, named | dict(kwargs)))
        except GuardError as error:
            reason = str(error).rpartition("; ")[0]
            raise GuardError(
                f"{reason}; for such calls trace the student anew, model.retrace(**call).save(FOLDER), and export that"
            ) from error

    def tables(self, bound: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the position tables of a call by name, on the CPU; `GuardError` where it is of another kind.

        They follow from numbers and sizes alone, so they are remembered for calls of the same kind.
        """
        if self._maker is None:
            return {}
        key = repr([(n, (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v) for n, v in bound.items()])
        if key not in self._known:
            self._known[key] = self._maker.tables(bound)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


class SizesOnly(Interpreter):
    """Runs the positions module of a graph whose parameters are on the meta device.

    A table may ask for the length or the device of a tensor that the model computed, an embedded text for example.
    Such a tensor is computed on the meta device, and what goes on is a tensor of its size that takes no memory.
    """

    def __init__(self, parted: GraphModule) -> None:
        positions: GraphModule = parted.meta[POSITIONS]
        super().__init__(positions)
        self.extra_traceback = False
        self._inputs = [n for n in positions.graph.nodes if n.op == "placeholder"]
        taken = {n.target for n in self._inputs}
        self.names = [str(n.target) for n in parted.graph.nodes if n.op == "placeholder" and n.target not in taken]
        self._of_values = _of_values(positions.graph.nodes)

    def tables(self, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the tables by name, for the arguments of the graph as it was before."""
        with torch.no_grad():
            found = self.run(*(stand_in(kwargs.get(str(n.target))) for n in self._inputs))
        return dict(zip(self.names, found, strict=True))

    def run_node(self, n: Node) -> Any:
        """Run one node; one that works on values runs on the meta device."""
        if n not in self._of_values or n.op in ("placeholder", "output"):
            return super().run_node(n)
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, self.fetch_args_kwargs_from_env(n))
        inside = self.fetch_attr(str(n.target)) if n.op == "call_module" else torch.nn.Module()
        with buffers_on_meta(inside, True):
            result = getattr(self, n.op)(n.target, args, kwargs)
        return tree_map_only(torch.Tensor, stand_in, result)


def stand_in(value: Any) -> Any:
    """Return a tensor of the same shape and type, on the CPU, that takes no memory; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _of_values(nodes: Iterable[Node]) -> set[Node]:
    """Return the nodes that follow from the values of a tensor argument."""
    found: set[Node] = set()
    for node in nodes:
        given = node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        if given or (any(source in found for source in node.all_input_nodes) and not looks_only(node)):
            found.add(node)
    return found
