"""Run-time guards: each decision the tracer took from an example value is checked again on every call."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect

from ppcl_fx.errors import GuardError


def expect(value: Any, expected: Any, words: str) -> None:
    """Raise `GuardError` when a scalar, a string, a dtype or a one-element tensor is not what the trace saw."""
    seen = value.item() if isinstance(value, torch.Tensor) else value
    if seen != expected:
        raise GuardError(
            f"this call lies outside of what was traced: {words} was {expected!r} while tracing and is {seen!r} now; "
            "trace the model again with inputs like these"
        )


def expect_tensor(value: Any, dims: int, words: str) -> None:
    """Raise `GuardError` unless `value` is a tensor with `dims` dimensions: shapes unpacked in the trace rely on it."""
    if not isinstance(value, torch.Tensor) or value.ndim != dims:
        seen = f"{value.ndim} dimensions" if isinstance(value, torch.Tensor) else type(value).__name__
        raise GuardError(
            f"this call lies outside of what was traced: {words} was a tensor with {dims} dimensions while tracing "
            f"and is {seen} now; trace the model again with inputs like these"
        )


def autocast_enabled(device_type: str) -> bool:
    """Tell whether `torch.autocast` is on for a kind of device: what a part that switches it off must know."""
    return torch.is_autocast_enabled(device_type)


has_side_effect(expect)
has_side_effect(expect_tensor)

# The last two are what torch.export writes.
GUARDS = (
    expect,
    expect_tensor,
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
)


def is_guard(node: Node) -> bool:
    """Tell whether `node` is a run-time guard."""
    return node.op == "call_function" and node.target in GUARDS


def guards(gm: GraphModule | Graph) -> list[Node]:
    """Return the guard nodes of a graph, in order."""
    graph = gm.graph if isinstance(gm, GraphModule) else gm
    return [node for node in graph.nodes if is_guard(node)]
