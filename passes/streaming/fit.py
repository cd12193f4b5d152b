"""Projectors start from least squares, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.files import read_safetensors, write_safetensors
from ppcl_fx.passes.initialise import RIDGE, projector_sites
from ppcl_fx.passes.probes import NormalEquations
from ppcl_fx.passes.streaming.cuts import reads
from ppcl_fx.passes.streaming.footprint import state_budget
from ppcl_fx.passes.streaming.measure import Report
from ppcl_fx.passes.streaming.runner import Read, Streamer
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.passes.watch import Watch
from ppcl_fx.tracing.guards import guards

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls


def fit_streamed(
    gm: GraphModule,
    calls: Calls,
    read: Read,
    work: Path,
    memory_limit: int | None,
    release: Callable[[], None],
    report: Report,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Fit every projector of a pluggable graph, as `initialise.fit_projectors` does.

    Args:
        gm: the pluggable graph, its parameters on the meta device.
        calls: recorded calls of the teacher.
        read: gives the graph's weights by name.
        work: a folder for what does not stay in memory.
        memory_limit: bytes that the process may hold; None for no limit.
        release: called after each block.
        report: told how far it is.
        device: where to compute.

    Returns:
        The projectors' weights and biases by name, memory-mapped.
    """
    sums: dict[Watch, tuple[str, NormalEquations]] = {}
    for node, source, target in projector_sites(gm):
        equations = NormalEquations(bias=True)
        sums[Watch((source, target), equations.add)] = (str(node.target), equations)
    if not sums:
        return {}
    needed = closure(gm, [node for watch in sums for node in watch.nodes])
    budget = 2**62 if memory_limit is None else state_budget(gm, calls, (), memory_limit)
    where = torch.device(device)
    runner = Streamer(
        gm, list(sums), read, States(work, budget, where), where, skip=lambda node: node not in needed
    )
    last = max(number for number, segment in enumerate(runner.segments) if segment.due)
    fitted: dict[str, Tensor] = {}
    for number in range(last + 1):

        def shown(call: int, result: Any, number: int = number) -> None:
            report(number * len(calls) + call + 1, (last + 1) * len(calls), "fitting projectors")

        runner.run_segment(number, calls, end=shown)
        release()
        for watch in (watch for watches in runner.segments[number].due.values() for watch in watches):
            path, equations = sums[watch]
            solved = equations.solve(RIDGE)
            equations.clear()
            assert solved.bias is not None
            file = work / f"{path}.safetensors"
            write_safetensors(file, {f"{path}.weight": solved.weight, f"{path}.bias": solved.bias})
            fitted |= read_safetensors(file)
    return fitted


def closure(gm: GraphModule, nodes: Sequence[Node]) -> set[Node]:
    """Return what must run to get the values of `nodes` from a pluggable graph that computes what its teacher does.

    Guards that look at nothing else belong to it, and so does what writes into a value that does.
    """
    needed: set[Node] = set()
    todo = list(nodes)
    checks = set(guards(gm))
    writers = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and node.is_impure() and node not in checks
    ]
    while todo:
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo.extend(reads(node))
        todo = [
            n for n in writers if n not in needed and n.all_input_nodes and n.all_input_nodes[0] in needed
        ]
    needed |= {node for node in gm.graph.nodes if node.op == "placeholder"}
    for check in checks:
        if all(_settled(node, needed) for node in check.all_input_nodes):
            todo.append(check)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(reads(node))
    return needed


def _settled(node: Node, needed: set[Node]) -> bool:
    """Tell whether a value follows from needed ones by questions about them alone: sizes, lengths, comparisons."""
    if node in needed:
        return True
    if isinstance(node.meta.get("val"), Tensor) or node.op in ("get_attr", "call_module"):
        return False
    return all(_settled(other, needed) for other in reads(node))
