"""The twin of an exported file: what it computes, in types whose results are PyTorch's to float32's accuracy.

A file of half precision is widened to float32. A file whose layers store their inputs in FP8 has a twin that does not:
where two ways of summing differ by the last bit, a value may be stored as its neighbour, which is 6 % away.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.half import HALF
from ppcl_fx.export.onnx.quantised import inputs_as_they_are
from ppcl_fx.export.onnx.writer import Prepared
from ppcl_fx.export.verify.metrics import agreement
from ppcl_fx.export.verify.onnx_runner import session
from ppcl_fx.export.verify.reference import Answers
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.graphs import copy_modules, reached
from ppcl_fx.passes.quantisation.linear import QuantisedLinear
from ppcl_fx.tracing.guards import guards


def compare(prepared: Prepared, path: Path) -> tuple[dict[str, float], Answers]:
    """Run a file, or its twin, in onnxruntime on every shape and compare it to PyTorch.

    The weights are those of the file, rounded as they are. So the comparison shows to float32's accuracy that the file
    computes what the model computes. How far half precision takes the results is another question: see `rounding`.
    onnxruntime has few kernels of half precision for the CPU, so such a file itself is not run. A twin lies beside its
    file meanwhile.

    Returns:
        The largest difference for each shape by name; and graph and file, to ask them more.

    Raises:
        PpclError: with inputs stored in FP8 the file is further from PyTorch than they are from inputs as they are.
    """
    answers = _answers(prepared, path)
    plain = _with_inputs_as_they_are(prepared.gm)
    if plain is not None:
        stored, answers = answers, _answers(replace(prepared, gm=plain), path, stored=False)
        _check_stored_inputs(stored, answers, path)
    return answers.differences(), answers


def _answers(prepared: Prepared, path: Path, *, stored: bool = True) -> Answers:
    """Open a file in onnxruntime, or its twin: widened where it is of half precision, its inputs `stored` or not."""
    half = main_dtype(prepared.gm) in HALF
    if stored and not half:
        return Answers(prepared, session(path))
    ir = need("onnx_ir")
    model = ir.load(path)
    if half:
        widen(model)
    if not stored:
        inputs_as_they_are(model.graph)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.twin-") as folder:
        twin = Path(folder) / path.name
        ir.save(model, twin, external_data=f"{path.name}.data")
        running = session(twin)
    return Answers(prepared, running, _wide(prepared.gm) if half else None)


def _with_inputs_as_they_are(gm: GraphModule) -> GraphModule | None:
    """Return a graph over the same tensors whose layers do not store their inputs; None where none does."""
    paths = [p for p, m in gm.named_modules() if isinstance(m, QuantisedLinear) and m.inputs is not None]
    if not paths:
        return None
    made = copy_modules(gm)
    for path in paths:
        layer = made.get_submodule(path)
        assert isinstance(layer, QuantisedLinear)
        layer.inputs = None
    return made


def _check_stored_inputs(stored: Answers, bare: Answers, path: Path) -> None:
    """Refuse a file whose stored inputs take it further from PyTorch than storing them takes PyTorch."""
    call = floats_as(stored.prepared.calls["traced"], stored.dtype)
    expected = stored.pytorch(call)
    away = agreement(stored.exported(call), expected, "traced").relative
    allowed = agreement(bare.pytorch(call), expected, "traced").relative
    if not away <= allowed:
        raise PpclError(
            f"{path}: with inputs in FP8 the file differs from PyTorch by {away:.2g}, more than the {allowed:.2g} that "
            "FP8 itself costs; nothing was kept; report the model"
        )


def _wide(gm: GraphModule) -> GraphModule:
    """Return a copy of a graph in which every bfloat16 and float16 is float32: weights and casts.

    What was decided by a type stays decided: guards that ask for one are gone.
    """
    made = copy.deepcopy(gm).float()
    made.meta = dict(gm.meta)
    for guard in guards(made):
        if any(isinstance(node.meta.get("val"), torch.dtype) for node in reached([guard], _python_inputs)):
            made.graph.erase_node(guard)
    for node in made.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _as_float32)
        if node.op == "call_method" and node.target in ("half", "bfloat16"):
            node.target = "float"
    made.recompile()
    return made


def _python_inputs(node: Node) -> list[Node]:
    """Return what a node is computed from, where that is no tensor: the way back to what a guard asks for."""
    return [] if isinstance(node.meta.get("val"), torch.Tensor) else node.all_input_nodes


def _as_float32(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALF else argument


def widen(model: Any) -> None:
    """Make float32 of every bfloat16 and float16 in an `onnx_ir.Model`, in place: weights, constants, casts, inputs."""
    ir = need("onnx_ir")
    half = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)

    def wide(tensor: Any) -> Any:
        return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)

    inner = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *inner):
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


def rounding(answers: Answers) -> float:
    """Return how far half precision takes the result of the traced call: the relative error, root mean square.

    It compares PyTorch in half precision to PyTorch in float32, with the same rounded weights and inputs. What the
    model itself rounds, a timestep for example, counts.
    """
    call = answers.prepared.calls["traced"]
    rounded = run_graph(answers.prepared.gm, call)[0]
    return agreement(rounded, answers.pytorch(floats_as(call, torch.float32)), "traced").relative
