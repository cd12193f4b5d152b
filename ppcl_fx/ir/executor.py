"""The executor: runs a traced graph on many calls, with a residency policy for weights and values, and serves watches.

The graph is cut at its blocks (`partition`). Where everything is in memory a call goes through all segments, and then
the next call does; where it is not, all calls go through one segment before the next, so that one block's weights are
needed at a time. A watch sees the calls in the same order either way: sums come out the same, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.graphs import attribute
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.partition import Segment, Watch, closure, cut
from ppcl_fx.ir.spill import Spill
from ppcl_fx.ir.switches import is_switch
from ppcl_fx.tracing import bind, graph_for

Read = Callable[[str], Tensor]
"""Gives a parameter or buffer of the graph module by name; raises KeyError for what no file holds."""

SEVERAL = (
    "the calls are of several kinds, and some go through other blocks than the rest (a guidance that skips blocks, "
    "perhaps); record without it"
)
"""What to say of calls whose sums cannot be added."""


@dataclass(frozen=True)
class Residency:
    """Where weights and values are while a graph runs.

    Attributes:
        device: where to compute. Weights that are elsewhere are there while their segment runs.
        read: where weights come from; None for the graph module's own.
        values: what keeps the calls' values between two segments; None to let a call go through all segments at once.
        release: called after each sweep, when its weights are not needed any more.
    """

    device: torch.device
    read: Read | None = None
    values: Spill | None = None
    release: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, gm: GraphModule) -> Residency:
        """Return the policy that has all in memory, on the device of the graph's parameters."""
        return cls(next((parameter.device for parameter in gm.parameters()), torch.device("cpu")))


class Executor:
    """Runs a graph, and those for other kinds of call (`ppcl_fx.tracing.graph_for`), without gradients.

    Values are freed after their last use in the graph and their last watch.

    Args:
        gm: the graph module. A pluggable graph gives what its teacher does.
        watches: gives what to look at in the graph of a kind of call.
        residency: where weights and values are; all in memory if left out.
        partial: run no more than what the watched values need.
    """

    def __init__(
        self,
        gm: GraphModule,
        watches: Callable[[GraphModule], Sequence[Watch]],
        residency: Residency | None = None,
        *,
        partial: bool = False,
    ) -> None:
        self._gm, self._watches, self._partial = gm, watches, partial
        self.residency = residency or Residency.of(gm)
        self._runs: dict[GraphModule, _Run] = {}
        self._kinds: list[GraphModule] = []
        self.segments = self._run_of(gm).segments

    @property
    def sweeps(self) -> list[range]:
        """The segments that all calls go through before the next ones, in order."""
        if self.residency.values is None:
            return [range(len(self.segments))]
        watched = [number for number, segment in enumerate(self.segments) if segment.due or not self._partial]
        return [range(number, number + 1) for number in range(watched[-1] + 1)]

    def run(
        self,
        sweep: range,
        calls: Iterable[Mapping[str, Any]],
        begin: Callable[[int], None] = lambda call: None,
        end: Callable[[int, Any], None] = lambda call, result: None,
    ) -> None:
        """Run all calls, given by their keyword arguments, through some segments; sweeps must be run in order.

        `begin` is told the position of each call before it runs, and `end` afterwards, with what the model returns if
        the last segment ran.

        Raises:
            PpclError: a call lacks an argument, goes through other blocks, or lies outside of the trace.
        """
        known = list(self._kinds) if sweep.start else []
        self._kinds = []
        opened: set[_Run] = set()
        with torch.no_grad(), ExitStack() as stack:
            for position, kwargs in enumerate([{}] * len(known) if known else calls):
                begin(position)
                kind = known[position] if known else graph_for(self._gm, kwargs)
                self._kinds.append(kind)
                run = self._run_of(kind)
                if run not in opened:
                    run.open(sweep, self.residency, stack)
                    opened.add(run)
                end(position, run.call(sweep, position, kwargs, self.residency))
        self.residency.release()

    def _run_of(self, graph: GraphModule) -> _Run:
        if graph not in self._runs:
            run = self._runs[graph] = _Run(graph, self._watches(graph), self._partial)
            if self.residency.values is not None and len(run.segments) != len(self._runs[self._gm].segments):
                raise PpclError(SEVERAL)
        return self._runs[graph]


class _Run(Interpreter):
    """The run of one kind's graph."""

    def __init__(self, gm: GraphModule, watches: Sequence[Watch], partial: bool) -> None:
        super().__init__(gm)
        self._gm = gm
        self._constants: dict[Node, Any] = {}
        needed = closure(gm, [node for watch in watches for node in watch.nodes]) if partial else set(gm.graph.nodes)
        self.segments = cut(gm, watches, lambda node: node not in needed)

    def open(self, sweep: range, residency: Residency, stack: ExitStack) -> None:
        """Load what the segments of a sweep need, until the stack is left."""
        segments = self.segments[sweep.start : sweep.stop]
        names = dict.fromkeys(name for segment in segments for name in segment.tensors)
        stack.enter_context(swapped(self._gm, _weights(self._gm, names, residency)))
        self._constants = {node: self.run_node(node) for segment in segments for node in segment.constants}

    def call(self, sweep: range, position: int, kwargs: Mapping[str, Any], residency: Residency) -> Any:
        """Run one call through the segments of a sweep, which are open."""
        values = residency.values
        if sweep.start == 0:
            nodes = tuple(self._gm.graph.find_nodes(op="placeholder"))
            given = moved_to(bound(self._gm, kwargs), residency.device)
        else:
            assert values is not None
            nodes, given = self.segments[sweep.start - 1].leaving, values.take(sweep.start, position)
        self.env = {**self._constants, **dict(zip(nodes, given, strict=True))}
        result = None
        for number in sweep:
            result = self._segment(self.segments[number])
        if values is not None and sweep.stop < len(self.segments):
            values.put(sweep.stop, position, [self.env[node] for node in self.segments[sweep.stop - 1].leaving])
        self.env = {}
        return result

    def run_node(self, n: Node) -> Any:
        # The graph computes what the teacher computes: a student is run only where somebody looks at it.
        return self.env[n.args[0]] if is_switch(n) else super().run_node(n)  # type: ignore[index]

    def _segment(self, segment: Segment) -> Any:
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


def _weights(gm: nn.Module, names: Iterable[str], residency: Residency) -> dict[str, Tensor]:
    """Return tensors of a module on the device, from where its weights are."""
    found = {name: own for name in names if isinstance(own := attribute(gm, name), Tensor)}
    for name, own in found.items():
        try:
            found[name] = (own if residency.read is None else residency.read(name)).to(residency.device)
        except KeyError:
            if own.is_meta:
                raise RuntimeError(f"no file holds {name}") from None
            found[name] = own.to(residency.device)
    return found


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a module's own parameters and buffers, by name, for some time."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            own = table.get(leaf)
            if own is None or tensor is own:  # a plain attribute, or there already
                continue
            before.append((table, leaf, own))
            table[leaf] = nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor
        yield
    finally:
        for table, leaf, own in reversed(before):
            table[leaf] = own


@contextmanager
def buffers_on_meta(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a module whose parameters are on the meta device run there with its real buffers, where this is wanted."""
    own = {n: b for n, b in module.named_buffers(remove_duplicate=False) if not b.is_meta} if wanted else {}
    with swapped(module, {name: buffer.to("meta") for name, buffer in own.items()}):
        yield


def on_meta(values: Mapping[str, Any]) -> bool:
    """Tell whether the tensors of a call are on the meta device."""
    return any(isinstance(value, Tensor) and value.is_meta for value in values.values())


def bound(gm: GraphModule, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values of a graph's placeholders, in order, from a call's keyword arguments. Raises `PpclError`: an
    argument is missing; `GuardError` where a traced model's fixed arguments differ from the call's.
    """
    # A graph of our own tracer knows which arguments it baked in; any other takes what its placeholders name.
    values = bind(gm, kwargs) if "inputs" in graph_info(gm) else dict(kwargs)
    out = []
    for node in gm.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name not in values and not node.args:
            raise PpclError(f"the call lacks the argument {name!r} of the traced model; record the calls again")
        out.append(values[name] if name in values else node.args[0])
    return out


def moved_to(value: Any, device: torch.device) -> Any:
    """Return nested values with every tensor on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
