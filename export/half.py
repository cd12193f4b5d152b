"""Files of half precision: what type they are in, whether its range holds the model, and how the file is checked."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import need
from ppcl_fx.export.graph_run import run_graph
from ppcl_fx.export.onnx_file import Prepared, compare, floats_as

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights and inputs, by the name of ``--dtype``. What a model computes in float32 stays float32 in all."""

MARGIN = 2.0
"""How many times the largest value seen has to fit into float16: other prompts reach further than the recorded ones."""

_CHOOSING = ("masked_fill", "where", "full", "full_like", "scalar_tensor")
"""Operations whose results are values that were given: a mask may hold minus infinity."""


def type_named(name: str) -> torch.dtype:
    """Return the type of a ``--dtype``.

    Raises:
        PpclError: there is no such name.
    """
    if name not in TYPES:
        raise PpclError(f"no dtype {name!r}{near(name, TYPES)}; it is one of {', '.join(TYPES)}")
    return TYPES[name]


# ---- the range of float16 ----------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Notes the largest absolute float16 value that each node of a graph computes, inside its modules too."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ""
        self.found: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        chosen = func._schema.name.partition("::")[2].rstrip("_") in _CHOOSING
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


class _NodeByNode(Interpreter):
    def __init__(self, gm: GraphModule, notes: _Largest) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.notes = notes

    def run_node(self, n: Node) -> Any:
        """Run one node, with its name known to the notes."""
        self.notes.node = str(n.target) if n.op == "call_module" else n.name
        return super().run_node(n)


def largest_values(gm: GraphModule, calls: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest absolute float16 value of each node of a float16 graph, in the order of computation.

    Args:
        gm: the graph; what it computes in float32 does not count.
        calls: its inputs by name, one mapping a call. A value that was finite and no longer is counts as infinite; an
            infinity that was given, in a mask, does not count.
    """
    notes = _Largest()
    runner = _NodeByNode(gm, notes)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), notes:
        for call in calls:
            runner.run(*(call[name] for name in names))
    return notes.found


def check_range(gm: GraphModule, calls: Sequence[Mapping[str, Any]]) -> float:
    """Show on recorded calls that float16 holds a model; return the largest value there is.

    Args:
        gm: the graph with float16 weights.
        calls: as for `largest_values`.

    Raises:
        PpclError: a value comes closer to the end of float16 than `MARGIN` allows; the first such node is named.
    """
    end = torch.finfo(torch.float16).max
    found = largest_values(gm, calls)
    for name, value in found.items():
        if value * MARGIN > end:
            raise PpclError(
                f"fp16 does not hold this model: {name} reaches {value:.3g} on the recorded calls, fp16 ends at "
                f"{end:g} and {MARGIN:g} times the value has to fit; export with --dtype bf16 or fp32"
            )
    return max(found.values(), default=0.0)


# ---- the check of a file that no runtime here runs ---------------------------------------------------------------


def compare_in_float32(prepared: Prepared, path: Path) -> tuple[dict[str, float], Any]:
    """Check a file of half precision: widen every type of it to float32, and compare that to PyTorch in float32.

    The weights are those of the file, rounded as they are. So the comparison shows to float32's accuracy that the file
    computes what the model computes. How far rounding takes the results is another question: see `rounding`.
    onnxruntime has few kernels of half precision for the CPU, so the file itself is not run.

    Args:
        prepared: the graph in half precision.
        path: its file.

    Returns:
        As `ppcl_fx.export.onnx_file.compare`; the session is that of the widened file.
    """
    ir = need("onnx_ir")
    calls = {name: floats_as(kwargs, torch.float32) for name, kwargs in prepared.calls.items()}
    wide = dataclasses.replace(prepared, gm=_in_float32(prepared.gm), calls=calls)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".widened-") as folder:
        model = ir.load(path)
        widen(model)
        twin = Path(folder) / path.name
        ir.save(model, twin, external_data=f"{path.name}.data")
        return compare(wide, twin)


def widen(model: Any) -> None:
    """Make float32 of every bfloat16 and float16 in an `onnx_ir.Model`, in place: weights, constants, casts, inputs."""
    ir = need("onnx_ir")
    half = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)

    def wide(tensor: Any) -> Any:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype in half:
            value.dtype = ir.DataType.FLOAT
            if value.const_value is not None:
                value.const_value = wide(value.const_value)
    for node in model.graph:
        for name, given in list(node.attributes.items()):
            if given.type == ir.AttributeType.TENSOR and given.value.dtype in half:
                node.attributes[name] = ir.AttrTensor(name, wide(given.value))
            elif name in ("to", "dtype") and given.type == ir.AttributeType.INT and given.value in half:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in half:
                value.dtype = ir.DataType.FLOAT


def widened_feeds(feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs with those of half precision as float32, for a widened model."""
    half = (torch.bfloat16, torch.float16)
    return {name: value.float() if value.dtype in half else value for name, value in feeds.items()}


def rounding(prepared: Prepared) -> float:
    """Return how far half precision takes the result of the traced call: the relative error, root mean square.

    It compares PyTorch in half precision to PyTorch in float32, with the same rounded weights and inputs.
    """
    call = prepared.calls["traced"]
    rounded = run_graph(prepared.gm, call)[0].double()
    exact = run_graph(_in_float32(prepared.gm), floats_as(call, torch.float32))[0].double()
    return float((rounded - exact).norm() / exact.norm())


def _in_float32(gm: GraphModule) -> GraphModule:
    wide = copy.deepcopy(gm).float()
    wide.meta = dict(gm.meta)
    return wide
