"""Projectors start from least squares, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.files import read_safetensors, write_safetensors
from ppcl_fx.passes.initialise import projector_sites, solved
from ppcl_fx.passes.probes import NormalEquations
from ppcl_fx.passes.streaming.cuts import closure
from ppcl_fx.passes.streaming.measure import Report
from ppcl_fx.passes.streaming.runner import Read, Streamer
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.passes.watch import Watch

if TYPE_CHECKING:
    from ppcl_fx.calls import Call


def fit_streamed(
    gm: GraphModule,
    calls: Sequence[Call],
    read: Read,
    work: Path,
    room: int,
    release: Callable[[], None],
    report: Report,
    device: str | torch.device = "cpu",
    in_students: bool = False,
) -> dict[str, Tensor]:
    """Fit the projectors of a pluggable graph, as `initialise.fit_projectors` does.

    Args:
        gm: the pluggable graph, its parameters on the meta device.
        calls: recorded calls of the teacher.
        read: gives the graph's weights by name.
        work: a folder for what does not stay in memory.
        room: bytes that the calls' values may take in memory between two blocks.
        release: called after each block.
        report: told how far it is.
        device: where to compute.
        in_students: fit only the projectors in depth edits' students.

    Returns:
        The projectors' weights and biases by name, memory-mapped.
    """
    wanted = [site for site in projector_sites(gm) if site.in_student or not in_students]
    sums = {site.path: NormalEquations(bias=True) for site in wanted}
    if not sums:
        return {}
    where = torch.device(device)
    states = States(work, room, where)
    paths: dict[Watch, str] = {}

    def runner_of(graph: GraphModule, others: Mapping[GraphModule, Streamer]) -> Streamer:
        watches = {site.watch(sums[site.path]): site.path for site in projector_sites(graph) if site.path in sums}
        paths.update(watches)
        needed = closure(graph, [node for watch in watches for node in watch.nodes])
        return Streamer(graph, list(watches), read, states, where, lambda node: node not in needed, others)

    runner = runner_of(gm, {other: runner_of(other, {}) for other in (gm.meta["ppcl"].get("kinds") or {}).values()})
    last = max(number for number, segment in enumerate(runner.segments) if segment.due)
    fitted: dict[str, Tensor] = {}
    for number in range(last + 1):

        def shown(call: int, result: Any, number: int = number) -> None:
            report(number * len(calls) + call + 1, (last + 1) * len(calls), "fitting projectors")

        runner.run_segment(number, calls, end=shown)
        release()
        for watch in (watch for watches in runner.segments[number].due.values() for watch in watches):
            path = paths[watch]
            equations = sums[path]
            projector = solved(path, equations, len(calls), in_students)
            equations.clear()
            if projector is None or projector.bias is None:
                continue
            file = work / f"{path}.safetensors"
            write_safetensors(file, {f"{path}.weight": projector.weight, f"{path}.bias": projector.bias})
            fitted |= read_safetensors(file)
    return fitted
