"""Run an exported ratio in PyTorch: the graph from the model spec, the weights from where the ONNX file has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.onnx.assemble import ROWS
from ppcl_fx.export.runtime.input_adapter import InputAdapter
from ppcl_fx.export.runtime.quantised_layers import STORED, put_quantised
from ppcl_fx.export.runtime.sessions import TYPES, SessionChoice
from ppcl_fx.export.store.weight_source import state
from ppcl_fx.export.tensorrt.request import load_onnx
from ppcl_fx.export.verify.onnx_runner import one_line
from ppcl_fx.io.files import inside
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.passes.lowering.lowering import lower


class TorchSession:
    """The lowered graph of an input adapter with the weights of an ONNX file.

    ``shared`` is what other ratios have already: mapped files by their path, and on a GPU their parts. What is made
    here is added.
    """

    def __init__(self, choice: SessionChoice, adapter: InputAdapter, shared: dict[Any, torch.Tensor]) -> None:
        self.choice = choice
        lowered = lower(adapter.gm, adapter.form)
        # A copy: the mixtures of other ratios share the modules, and those stay on the meta device.
        self.graph, self.inputs = copy.deepcopy(copy_graph_module(lowered.graph)), lowered.inputs
        weights = _joined(dict(_weights(choice.file, shared)))
        put_quantised(self.graph, choice.file, weights, lambda tensor: _placed(tensor, choice.device, shared))
        _fill(self.graph, weights, choice, shared)
        self.graph.eval()

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run the graph; `PpclError` where the model does not take such shapes."""
        try:
            with torch.no_grad():
                result = self.graph(*(feeds[name] for name in self.inputs))
        except (RuntimeError, IndexError, ValueError) as error:
            raise PpclError(
                f"{self.choice.file.name}: the model does not take this call ({one_line(error)})"
            ) from error
        first = result[0] if isinstance(result, (tuple, list)) else result
        assert isinstance(first, torch.Tensor)
        return first


def _weights(file: Path, shared: dict[Any, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's weights by name: views of mapped files where they are stored outside of it."""
    outside = need("onnx_ir").ExternalTensor
    for name, value in load_onnx(file).graph.initializers.items():
        const = value.const_value
        kind, shape = const.dtype.name.lower(), tuple(const.shape)
        dtype = TYPES.get(kind) or STORED.get(kind)
        if dtype is None:
            continue
        if isinstance(const, outside):
            data = _part(file, const, shared)
        else:
            data = torch.frombuffer(bytearray(const.tobytes() or b"\0"), dtype=torch.uint8)[: const.nbytes]
        aligned = data.storage_offset() % dtype.itemsize == 0
        yield name, (data if aligned else data.clone()).view(dtype).view((*shape[:-1], -1) if kind in STORED else shape)


def _joined(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put the rows of weights together that the file has in several parts, as its graph does."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name in [name for name in weights if name.rpartition(ROWS)[2].isdigit()]:
        whole, _, number = name.rpartition(ROWS)
        parts.setdefault(whole, {})[int(number)] = weights.pop(name)
    return weights | {name: torch.cat([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}


def _part(file: Path, const: Any, shared: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Return the bytes of a tensor that lies in another file."""
    path = inside(file.parent, str(const.location))
    if not path.is_file():
        raise PpclError(f"{path}: no such file, and {file.name} has its weights there; copy it there, or export again")
    length, offset = path.stat().st_size, const.offset or 0
    size = const.nbytes if const.length is None else const.length
    if offset < 0 or size != const.nbytes:
        raise PpclError(
            f"{file}: {const.name} is {const.nbytes} bytes long, and {size} bytes from {offset} on in {path.name} are "
            "said to be it; export again"
        )
    if offset + size > length:
        raise PpclError(f"{path}: is shorter than {file.name} says; copy it again, or export again")
    if path not in shared:
        shared[path] = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
    return shared[path][offset : offset + size]


def _fill(
    graph: GraphModule, weights: dict[str, torch.Tensor], choice: SessionChoice, shared: dict[Any, torch.Tensor]
) -> None:
    """Put weights into a graph in the place of its parameters on the meta device, and of its buffers."""
    for name, wanted in state(graph).items():
        is_parameter = isinstance(wanted, nn.Parameter)
        if is_parameter and name not in weights:
            continue  # without effect on the output: the file has no use for it
        found = weights.get(name, wanted)  # a checkpoint may hold other buffers than the class computes
        alike = found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())
        if found.shape != wanted.shape or not alike:  # which float it is, the file decides
            raise PpclError(
                f"{choice.file}: {name} is {found.dtype} {list(found.shape)} there and {wanted.dtype} "
                f"{list(wanted.shape)} in the model of head.json; they are not of one export: export again"
            )
        tensor = _placed(found, choice.device, shared)
        parent, _, leaf = name.rpartition(".")
        setattr(graph.get_submodule(parent), leaf, nn.Parameter(tensor, False) if is_parameter else tensor)
    reached = [str(node.target) for node in graph.graph.nodes if node.op in ("get_attr", "call_module")]
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        if parameter.is_meta and any(f"{name}.".startswith(f"{target}.") for target in reached):
            raise PpclError(f"{choice.file}: holds no {name}, which the model of head.json needs; export again")


def _placed(tensor: torch.Tensor, device: torch.device, shared: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Return a weight on a device; a part of a mapped file goes there once for all ratios."""
    if device.type == "cpu":
        return tensor
    place = tensor.untyped_storage().data_ptr()
    # Mapped files stay open in `shared`, so their addresses are theirs. Any other tensor may be freed, and the next one
    # lie where it lay.
    file = next((key for key, whole in shared.items() if isinstance(key, Path) and whole.data_ptr() == place), None)
    if file is None:
        return tensor.to(device)
    key = (file, tensor.storage_offset() * tensor.itemsize, tensor.dtype, tensor.shape)
    if key not in shared:
        shared[key] = tensor.to(device)
    return shared[key]
