"""Half precision: its types, and whether float16 holds a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.errors import PpclError
from ppcl_fx.export.onnx.graph_run import GraphRun
from ppcl_fx.passes.lowering.lowering import END
from ppcl_fx.tracing import bind, with_rows

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls

HALF = (torch.bfloat16, torch.float16)

MARGIN = 2.0
"""How many times the largest value seen has to fit into float16: other prompts reach further than the recorded ones."""

CALLS = 8
"""Recorded calls that are looked at, at most, evenly spread."""

_CHOOSING = (
    "masked_fill", "where", "full", "full_like", "scalar_tensor", "clamp", "empty", "empty_like", "empty_strided",
    "new_empty", "copy",
)  # fmt: skip
"""Operations whose results are values that were given: a mask may hold minus infinity, and memory that nobody has
written to anything."""


# ---- the range of float16 ----------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Notes the largest absolute float16 value that each node of a graph computes, inside its modules too."""

    supports_higher_order_operators = True  # flex attention is one, and compiles itself

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let PyTorch compile while this looks on."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node = ""
        self.found: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns if hasattr(func, "_schema") else ()
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returned)
        chosen = view or func.name().partition("::")[2].rstrip("_") in _CHOOSING
        given = chosen or any(not bool(value.isfinite().all()) for value in _floats((args, kwargs)))
        for value in _floats(result):
            if value.dtype == torch.float16:
                finite = value[value.isfinite()]
                largest = float(finite.abs().max()) if finite.numel() else 0.0
                if finite.numel() < value.numel() and not given:  # it became too large here
                    largest = float("inf")
                if not chosen:
                    self.found[self.node] = max(self.found.get(self.node, 0.0), largest)
        return result


def _floats(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor) and value.is_floating_point()]


class _NodeByNode(GraphRun):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.notes = _Largest()

    def run_node(self, n: Node) -> Any:
        """Run one node, with its name known to the notes."""
        self.notes.node = str(n.target) if n.op == "call_module" else n.name
        return super().run_node(n)


def largest_values(gm: GraphModule, calls: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest absolute float16 value of each node of a float16 graph, in the order of computation.

    What it computes in float32 does not count. A value that was finite and no longer is counts as infinite; an infinity
    that was given, in a mask, does not count.
    """
    runner = _NodeByNode(gm)
    with runner.notes:
        for call in calls:
            runner.on(call)
    return runner.notes.found


def check_range(gm: GraphModule, calls: Iterable[Mapping[str, Any]]) -> float:
    """Show on calls that float16 holds a graph with float16 weights; return the largest value there is.

    Raises:
        PpclError: a value comes closer to the end of float16 than `MARGIN` allows; the first such node is named.
    """
    found = largest_values(gm, calls)
    for name, value in found.items():
        if value * MARGIN > END:
            raise PpclError(
                f"fp16 does not hold this model: {name} reaches {value:.3g} on the recorded calls, fp16 ends at "
                f"{END:g} and {MARGIN:g} times the value has to fit; export with --dtype bf16 or fp32"
            )
    return max(found.values(), default=0.0)


def largest_value(gm: GraphModule, calls: Calls | None, unchecked: str | None) -> float:
    """Show that a float16 graph may leave, before anything is written.

    Args:
        gm: the graph.
        calls: recorded calls; `CALLS` of them are run.
        unchecked: why its weights cannot be run here, if so.

    Returns:
        The largest absolute value on the calls.

    Raises:
        PpclError: there are no calls, the weights were not read, or a value comes too near to the end of float16.
    """
    if unchecked is not None:
        raise PpclError(f"fp16: whether it holds the model is {unchecked}; raise the limit, or export bf16")
    if calls is None:
        raise PpclError("fp16: whether it holds the model is shown on recorded calls; give --calls, or export bf16")
    count = min(CALLS, len(calls))
    chosen = (calls[index * len(calls) // count] for index in range(count))
    return check_range(gm, (floats_as(bind(gm, with_rows(gm, call.kwargs)), torch.float16) for call in chosen))
