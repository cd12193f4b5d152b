"""Projectors start from least squares: one run on recorded calls, normal equations (Eq. 1 with a bias)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import read_safetensors, write_safetensors
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.partition import Watch
from ppcl_fx.ir.switches import host, is_switch, student_end
from ppcl_fx.passes.analysis.probes import NormalEquations, Projector
from ppcl_fx.passes.calibration.calibration import Notify, silent
from ppcl_fx.passes.calibration.held_out import enough

RIDGE = 1e-4
_log = logging.getLogger("ppcl_fx")


class ProjectorSite(NamedTuple):
    """A projector in a pluggable graph, and the values that it is fitted to.

    `nodes` are its input and what it replaces, and for a student's stream also what leaves the student there and what
    the teacher has in its place. Where it is `in_student`, a depth edit's, its fit is of the student as it is.
    """

    path: str
    nodes: tuple[Node, ...]
    in_student: bool


def _watch(site: ProjectorSite, sums: NormalEquations) -> Watch:
    """Return the watch that adds a call's tokens to the sums of a projector."""

    def add(source: Tensor, replaced: Tensor, *end: Tensor) -> None:
        # What is added behind a student (a ControlNet's residual) is not the projector's to learn.
        sums.add(source, end[1] - (end[0] - replaced) if end else replaced)

    return Watch(site.nodes, add)


def fit_projectors(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    *,
    in_students: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Set projectors of a pluggable graph, in place, to the least-squares maps from their inputs to teacher values.

    Each is fitted to the teacher's own states, independently of all other edits. In a depth edit's student its input is
    the student's, and so is the value that feeds the student's attention.

    Args:
        gm: the pluggable graph.
        calls: keyword arguments of recorded calls of the teacher.
        in_students: fit only the projectors in depth edits' students, which another training of the student has made
            stale.
        device: where to compute; where the graph is if left out.

    Returns:
        The projectors' module paths, of those too that stay as they are for want of tokens.

    Raises:
        PpclError: the calls hold NaN, do not fit the graph, or are too few for a first fit.
    """
    residency = Residency(device) if device is not None else Residency.of(gm)
    found = dict(_fitted(gm, calls, residency, in_students))
    for path, projector in found.items():
        if projector is not None and projector.bias is not None:
            gm.get_submodule(path).load_state_dict({"weight": projector.weight, "bias": projector.bias})
    return list(found)


def fit_on_disk(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    count: int,
    residency: Residency,
    work: Path,
    report: Notify,
    in_students: bool = False,
) -> dict[str, Tensor]:
    """Fit projectors as `fit_projectors` does, with one block's weights in memory at a time.

    The graph's parameters are on the meta device. `count` is the number of calls. What does not stay in memory goes to
    the folder `work`. Returns the fitted weights and biases by parameter name, memory-mapped.

    Raises:
        PpclError: the disk is full, or as `fit_projectors`.
    """
    fitted: dict[str, Tensor] = {}
    for path, projector in _fitted(gm, calls, residency, in_students, report, count):
        if projector is not None and projector.bias is not None:
            file = work / f"{path}.safetensors"
            write_safetensors(file, {f"{path}.weight": projector.weight, f"{path}.bias": projector.bias})
            fitted |= read_safetensors(file)
    return fitted


def _fitted(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    residency: Residency,
    in_students: bool,
    report: Notify = silent,
    count: int = 0,
) -> Iterator[tuple[str, Projector | None]]:
    """Run what the projectors need, and give the map of each as soon as its sums are there; None for what stays."""
    sums = {s.path: NormalEquations(bias=True) for s in projector_sites(gm) if s.in_student or not in_students}
    if not sums:
        return
    paths: dict[Watch, str] = {}

    def watches(graph: GraphModule) -> list[Watch]:
        mine = {_watch(site, sums[site.path]): site.path for site in projector_sites(graph) if site.path in sums}
        paths.update(mine)
        return list(mine)

    executor, ran = Executor(gm, watches, residency, partial=True), 0
    for number, sweep in enumerate(sweeps := executor.sweeps):

        def end(call: int, result: Any, number: int = number) -> None:
            nonlocal ran
            ran = max(ran, call + 1)
            report(number * count + call + 1, len(sweeps) * count, "fitting projectors")

        executor.run(sweep, calls, end=end)
        for segment in executor.segments[sweep.start : sweep.stop]:
            for watch in (watch for watches in segment.due.values() for watch in watches):
                path = paths[watch]
                yield path, _solved(path, sums[path], ran, in_students)
                sums[path].clear()


def _solved(path: str, sums: NormalEquations, calls: int, in_students: bool) -> Projector | None:
    """Return the map of a projector; None for one that is to be fitted again and stays as it is, for want of tokens.
    Raises `PpclError`: there are too few tokens for a first fit; the line says how many calls would do.
    """
    try:
        few = enough(path, sums, calls, sums.samples)
    except PpclError as error:
        if not in_students:
            raise
        # A training that is done is not to be lost for it.
        _log.warning("%s; it stays as it was before its student was trained", error)
        return None
    if few:
        _log.warning("%s", few)
    return sums.solve(RIDGE)


def projector_sites(gm: GraphModule) -> list[ProjectorSite]:
    """Return the projectors of a pluggable graph, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_module" or not str(node.target).startswith("projectors."):
            continue
        (total,) = node.users
        for user in total.users:
            if is_switch(user) and user.args[1] is total:
                nodes = (node.args[0], user.args[0], *(student_end(gm, user) or ()))
                found.append(ProjectorSite(str(node.target), nodes, bool(host(gm, user))))
    return found
