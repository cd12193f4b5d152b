"""Run a module that makes position tables without weights: of what the weights compute, it needs the sizes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map_only

from ppcl_fx.ir.executor import buffers_on_meta
from ppcl_fx.passes.lowering.positions import POSITIONS, looks_only


class SizesOnly(Interpreter):
    """Runs the positions module of a graph whose parameters are on the meta device.

    A table may ask for the length or the device of a tensor that the model computed, an embedded text for example.
    Such a tensor is computed on the meta device, and what goes on is a tensor of its size that takes no memory.

    Args:
        parted: a graph after `ppcl_fx.passes.lowering.positions.PositionsAsInputs`, with tables.
    """

    def __init__(self, parted: GraphModule) -> None:
        positions: GraphModule = parted.meta[POSITIONS]
        super().__init__(positions)
        self.extra_traceback = False
        self._inputs = [n for n in positions.graph.nodes if n.op == "placeholder"]
        taken = {n.target for n in self._inputs}
        self._names = [str(n.target) for n in parted.graph.nodes if n.op == "placeholder" and n.target not in taken]
        self._of_values = _of_values(positions.graph.nodes)

    def tables(self, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the tables by name.

        Args:
            kwargs: the arguments of the graph as it was before; of tensors only shape and type are looked at.

        Raises:
            GuardError: the tables were traced for another kind of call.
        """
        with torch.no_grad():
            found = self.run(*(stand_in(kwargs.get(str(n.target))) for n in self._inputs))
        return dict(zip(self._names, found, strict=True))

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
