"""Run a traced graph on many calls with one block's weights at a time: all calls go through it, then the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.measure import SEVERAL
from ppcl_fx.passes.streaming.cuts import Segment, cut
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.passes.switches import is_switch
from ppcl_fx.passes.watch import Watch, bound, moved_to
from ppcl_fx.tracing import graph_for

if TYPE_CHECKING:
    from ppcl_fx.calls import Call

Read = Callable[[str], Tensor]
"""Gives a parameter or buffer of the graph module by name; raises KeyError for what no file holds."""


class Streamer(Interpreter):
    """An interpreter that serves the same watches as `Watcher`, segment by segment.

    In each segment a watch sees the calls in their order, so sums come out as in an unstreamed run, to the bit.

    Args:
        gm: the graph module; its parameters may be on the meta device.
        watches: what to look at.
        read: where weights come from.
        states: where the calls' values are kept between segments.
        device: where to compute.
        skip: nodes that are not run.
        others: what runs the graphs for other kinds of call (`ppcl_fx.tracing.graph_for`), with watches of their own.

    Raises:
        PpclError: calls of another kind go through other blocks.
    """

    def __init__(
        self,
        gm: GraphModule,
        watches: Sequence[Watch],
        read: Read,
        states: States,
        device: torch.device,
        skip: Callable[[Node], bool] = lambda node: False,
        others: Mapping[GraphModule, Streamer] | None = None,
    ) -> None:
        super().__init__(gm)
        self._others = dict(others or {})
        self._gm = gm
        self._read = read
        self._states = states
        self._device = device
        self._constants: dict[Node, Any] = {}
        self.segments = cut(gm, watches, skip)
        if any(len(other.segments) != len(self.segments) for other in self._others.values()):
            raise PpclError(SEVERAL)

    def run_segment(
        self,
        number: int,
        calls: Sequence[Call],
        begin: Callable[[int], None] = lambda call: None,
        end: Callable[[int, Any], None] = lambda call, result: None,
    ) -> None:
        """Run all calls through one segment, without gradients; the segments must be run in order.

        Args:
            number: of the segment, from 0.
            calls: the calls.
            begin: told the position of each call before it runs.
            end: told it afterwards, with what the model returns if this is the last segment, else None.

        Raises:
            PpclError: a call lacks an argument; `GuardError` where the trace does not cover it.
        """
        with torch.no_grad(), ExitStack() as stack:
            for runner in (self, *self._others.values()):
                runner._open(number, stack)
            for position, call in enumerate(calls):
                begin(position)
                runner = self._others.get(graph_for(self._gm, call.kwargs), self) if self._others else self
                end(position, runner._one(number, position, call))

    def _open(self, number: int, stack: ExitStack) -> None:
        """Load what a segment needs, until the stack is left."""
        segment = self.segments[number]
        stack.enter_context(loaded(self._gm, segment.tensors, self._read, self._device))
        self._constants = {node: self.run_node(node) for node in segment.constants}

    def _one(self, number: int, position: int, call: Call) -> Any:
        """Run one call through a segment that is open."""
        segment = self.segments[number]
        self.env = dict(self._constants)
        if number == 0:
            self._bind(call)
        else:
            self.env.update(zip(self.segments[number - 1].leaving, self._take(number, position), strict=True))
        result = self._run(segment)
        if number + 1 < len(self.segments):
            self._states.put(number + 1, position, [self.env[node] for node in segment.leaving])
        self.env = {}
        return result

    def run_node(self, n: Node) -> Any:
        # The graph computes what the teacher computes: a student is run only where somebody looks at it.
        return self.env[n.args[0]] if is_switch(n) else super().run_node(n)  # type: ignore[index]

    def _take(self, number: int, position: int) -> list[Any]:
        values: list[Any] = self._states.take(number, position)
        return values

    def _bind(self, call: Call) -> None:
        placeholders = self._gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, bound(self._gm, call.kwargs), strict=True):
            self.env[node] = moved_to(value, self._device)

    def _run(self, segment: Segment) -> Any:
        result = None
        for node in segment.nodes:
            if node.op == "output":
                result = self.run_node(node)
            elif node.op != "placeholder":
                self.env[node] = self.run_node(node)
            for watch in segment.due.get(node, ()):
                watch.observer(*(self.env[n] for n in watch.nodes))
            for value in segment.drops.get(node, ()):
                self.env.pop(value, None)
        return result


@contextmanager
def loaded(gm: nn.Module, names: Sequence[str], read: Read, device: torch.device) -> Iterator[None]:
    """Put tensors in the place of a module's own while the block runs; what no file holds is moved to `device`."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = gm.get_submodule(path)
            table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            if leaf not in table:
                continue  # a plain attribute
            own = table[leaf]
            try:
                tensor = read(name).to(device)
            except KeyError:
                if own.is_meta:
                    raise RuntimeError(f"no file holds {name}") from None
                tensor = own.to(device)
            before.append((table, leaf, own))
            table[leaf] = (
                nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor
            )
        yield
    finally:
        for table, leaf, own in reversed(before):
            table[leaf] = own
