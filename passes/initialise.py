"""Projectors start from least squares: one pass over recorded calls, streamed normal equations (Eq. 1 with a bias)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.held_out import enough
from ppcl_fx.passes.probes import NormalEquations, Projector
from ppcl_fx.passes.streaming.cuts import closure, reads
from ppcl_fx.passes.switches import host, is_switch, student_end
from ppcl_fx.passes.watch import Watch, Watcher
from ppcl_fx.tracing import graph_for

RIDGE = 1e-4
_log = logging.getLogger("ppcl_fx")


@dataclass(frozen=True, eq=False)
class ProjectorSite:
    """A projector in a pluggable graph, and the values that it is fitted to.

    Attributes:
        path: the projector's module path.
        nodes: its input and what it replaces, and for a student's stream also what leaves the student there and
            what the teacher has in its place.
        in_student: whether it lies in a depth edit's student, so that its fit is of the student as it is.
    """

    path: str
    nodes: tuple[Node, ...]
    in_student: bool

    def watch(self, sums: NormalEquations) -> Watch:
        """Return the watch that adds a call's tokens to the sums of this projector."""

        def add(source: Tensor, replaced: Tensor, student: Tensor | None = None, teacher: Tensor | None = None) -> None:
            if student is None or teacher is None:
                sums.add(source, replaced)
            else:
                # What is added behind a student (a ControlNet's residual) is not the projector's to learn.
                sums.add(source, teacher - (student - replaced))

        return Watch(self.nodes, add)


def fit_projectors(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    *,
    in_students: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Set projectors of a pluggable graph to the least-squares maps from their inputs to the teacher's values.

    Each is fitted to the teacher's own states, independently of all other edits. In a depth edit's student its input is
    the student's, and so is the value that feeds the student's attention.

    Args:
        gm: the pluggable graph; its projectors are changed in place.
        calls: keyword arguments of recorded calls of the teacher.
        in_students: fit only the projectors in depth edits' students, which another training of the student has made
            stale.
        device: where to compute; what is needed is moved there and stays. Where it is if left out.

    Returns:
        The module paths of the projectors that were fitted.

    Raises:
        PpclError: the calls hold NaN, do not fit the graph, or are too few for a first fit.
    """
    sites = [site for site in projector_sites(gm) if site.in_student or not in_students]
    if not sites:
        return []
    sums = {site.path: NormalEquations(bias=True) for site in sites}
    watchers: dict[GraphModule, Watcher] = {}
    count = 0
    for kwargs in calls:
        graph = graph_for(gm, kwargs)
        if graph not in watchers:
            watchers[graph] = _watcher(graph, sums, device)
        watchers[graph].watch(kwargs)
        count += 1
    fitted = {path: solved(path, equations, count, in_students) for path, equations in sums.items()}
    for path, projector in fitted.items():
        linear = gm.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if projector is not None and projector.bias is not None:
            with torch.no_grad():
                linear.weight.copy_(projector.weight)
                linear.bias.copy_(projector.bias)
    return list(sums)


def _watcher(gm: GraphModule, sums: Mapping[str, NormalEquations], device: torch.device | None) -> Watcher:
    """Return what runs the part of a graph that some projectors need, and adds to their sums."""
    sites = [site for site in projector_sites(gm) if site.path in sums]
    part, mine = _part(gm, [node for site in sites for node in site.nodes])
    sites = [ProjectorSite(s.path, tuple(mine[node] for node in s.nodes), s.in_student) for s in sites]
    if device is not None:
        part.to(device)
    return Watcher(part, [site.watch(sums[site.path]) for site in sites])


def solved(path: str, sums: NormalEquations, calls: int, in_students: bool) -> Projector | None:
    """Return the map of a projector; None for one that is to be fitted again and stays as it is, for want of tokens.

    Raises:
        PpclError: there are too few tokens for a first fit; the line says how many calls would do.
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


def _part(gm: GraphModule, nodes: Iterable[Node]) -> tuple[GraphModule, dict[Node, Node]]:
    """Return the part of a pluggable graph, every switch at its teacher, that gives some nodes' values.

    Returns:
        The part, over the same modules; and node of the whole -> node of the part.
    """
    needed = closure(gm, list(nodes))
    graph = Graph(tracer_cls=None)
    mine: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            mine[node] = mine[reads(node)[0]] if is_switch(node) else graph.node_copy(node, mine.__getitem__)
    graph.output(None)
    part = GraphModule(gm, graph, class_name="Projected")
    part.meta = dict(gm.meta)
    return part, mine
