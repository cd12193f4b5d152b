"""Projectors start from least squares: one pass over recorded calls, streamed normal equations (Eq. 1 with a bias)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.calls import Calls
from ppcl_fx.passes.probes import NormalEquations
from ppcl_fx.passes.switches import is_switch
from ppcl_fx.passes.watch import Watch, Watcher

RIDGE = 1e-4


def fit_projectors(gm: GraphModule, calls: Calls, progress: Callable[[int, int], None] | None = None) -> None:
    """Set every projector of a pluggable graph to the least-squares map from its input to the teacher's value.

    Each is fitted to the teacher's own states, independently of all other edits.

    Args:
        gm: the pluggable graph; its projectors are changed in place.
        calls: recorded calls of the teacher.
        progress: called with the calls done and their number.

    Raises:
        PpclError: the calls hold NaN, or do not fit the graph.
    """
    sites = list(projector_sites(gm))
    if not sites:
        return
    sums = {node: NormalEquations(bias=True) for node, _, _ in sites}
    watches = [Watch((source, target), sums[node].add) for node, source, target in sites]
    watcher = Watcher(gm, watches)
    for done, call in enumerate(calls, start=1):
        watcher.watch(call.kwargs)
        if progress is not None:
            progress(done, len(calls))
    for node, _, _ in sites:
        linear = gm.get_submodule(str(node.target))
        assert isinstance(linear, nn.Linear)
        fitted = sums[node].solve(RIDGE)
        assert fitted.bias is not None
        with torch.no_grad():
            linear.weight.copy_(fitted.weight)
            linear.bias.copy_(fitted.bias)


def projector_sites(gm: GraphModule) -> list[tuple[Node, Node, Node]]:
    """Return, for each projector, its node, its input, and the teacher's value that it stands in for."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_module" or not str(node.target).startswith("projectors."):
            continue
        (total,) = node.users
        for user in total.users:
            if is_switch(user) and user.args[1] is total:
                found.append((node, node.args[0], user.args[0]))
    return found
