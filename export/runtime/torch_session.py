"""Run an exported ratio in PyTorch: the graph from the head, the weights from where the ONNX file has them."""

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
from ppcl_fx.export.runtime.head import Front
from ppcl_fx.export.runtime.limits import TYPES
from ppcl_fx.export.runtime.sessions import SessionChoice
from ppcl_fx.io.files import inside
from ppcl_fx.ir.graphs import copy_graph_module
from ppcl_fx.passes.lowering.lowering import lower


class TorchSession:
    """The lowered graph with the weights of an ONNX file.

    Args:
        choice: the file and the device.
        front: the ratio's mixture on the meta device.
        shared: what other ratios have already: mapped files by their path, and on a GPU their parts; what is made here
            is added.

    Raises:
        PpclError: the file is damaged, or its weights are not those of the head's model.
    """

    def __init__(self, choice: SessionChoice, front: Front, shared: dict[Any, torch.Tensor]) -> None:
        self.choice = choice
        lowered = lower(front.gm)
        # A copy: the mixtures of other ratios share the modules, and those stay on the meta device.
        self.graph, self.inputs = copy.deepcopy(copy_graph_module(lowered.graph)), lowered.inputs
        _fill(self.graph, _joined(dict(_weights(choice.file, shared))), choice, shared)
        self.graph.eval()

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run the graph.

        Raises:
            PpclError: the model does not take such shapes.
        """
        del sizes, profile
        try:
            with torch.no_grad():
                result = self.graph(*(feeds[name] for name in self.inputs))
        except (RuntimeError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PpclError(f"{self.choice.file.name}: the model does not take this call ({reason})") from error
        first = result[0] if isinstance(result, (tuple, list)) else result
        assert isinstance(first, torch.Tensor)
        return first


def _weights(file: Path, shared: dict[Any, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a file's weights by name: views of mapped files where they are stored outside of it."""
    ir = need("onnx_ir")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf has many ways to say it
        raise PpclError(f"{file}: not an ONNX file ({' '.join(str(error).split())[:200]}); export again") from error
    for name, value in model.graph.initializers.items():
        const = value.const_value
        dtype = TYPES.get(const.dtype.name.lower())
        if dtype is None:
            continue
        if isinstance(const, ir.ExternalTensor):
            data = _part(file, const, shared)
        else:
            data = torch.frombuffer(bytearray(const.tobytes() or b"\0"), dtype=torch.uint8)[: const.nbytes]
        yield name, _as(data, dtype).view(tuple(const.shape))


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


def _as(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    aligned = data.storage_offset() % dtype.itemsize == 0
    return (data if aligned else data.clone()).view(dtype)


def _fill(
    graph: GraphModule, weights: dict[str, torch.Tensor], choice: SessionChoice, shared: dict[Any, torch.Tensor]
) -> None:
    """Put weights into a graph in the place of its parameters on the meta device."""
    own = dict(graph.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        found = weights.get(name)
        if found is None:
            continue  # without effect on the output: the file has no use for it
        _check_like(name, found, parameter, choice)
        _set(graph, name, nn.Parameter(_placed(found, choice.device, shared), requires_grad=False))
    for name, buffer in list(graph.named_buffers(remove_duplicate=False)):
        found = weights.get(name, buffer)  # a checkpoint may hold others than the class computes
        _check_like(name, found, buffer, choice)
        parent, _, leaf = name.rpartition(".")
        graph.get_submodule(parent)._buffers[leaf] = _placed(found, choice.device, shared)
    missing = [name for name in _used(graph) if graph.get_parameter(name).is_meta]
    if missing:
        raise PpclError(f"{choice.file}: holds no {missing[0]}, which the model of head.json needs; export again")


def _check_like(name: str, found: torch.Tensor, wanted: torch.Tensor, choice: SessionChoice) -> None:
    """Refuse a tensor of another shape or kind; which float it is, the file decides."""
    alike = found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())
    if found.shape != wanted.shape or not alike:
        raise PpclError(
            f"{choice.file}: {name} is {found.dtype} {list(found.shape)} there and {wanted.dtype} "
            f"{list(wanted.shape)} in the model of head.json; they are not of one export: export again"
        )


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


def _set(graph: GraphModule, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    graph.get_submodule(parent)._parameters[leaf] = parameter


def _used(graph: GraphModule) -> list[str]:
    """Return the names of the parameters that the nodes of a graph reach."""
    own = dict(graph.named_parameters(remove_duplicate=False))
    found: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in own:
            found.append(str(node.target))
        elif node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            found += [f"{node.target}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
    return found
