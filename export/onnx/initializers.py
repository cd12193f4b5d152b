"""What an initializer of a graph is: a place in a file, or values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ppcl_fx.export.onnx.assemble import Initial, held
from ppcl_fx.export.store.weight_source import WeightPiece, WeightSource
from ppcl_fx.export.store.weight_store import Store

Pieces = Mapping[str, Sequence[WeightPiece]]
"""For each parameter what it is made of."""


def external(store: Store, pieces: Pieces) -> Initial:
    """Let initializers point to where the weights lie; small tables that no file holds are in the graph."""

    def initial(name: str, tensor: torch.Tensor) -> Sequence[ir.TensorProtocol]:
        if name not in pieces:
            return _own(name, tensor)
        found = []
        for piece in pieces[name]:
            file, offset, dtype = store.place(piece)
            assert dtype == tensor.dtype, (name, dtype, tensor.dtype)
            length = torch.Size(piece.shape).numel() * dtype.itemsize
            kind, shape = onnx_dtype(dtype), ir.Shape(piece.shape)
            found.append(
                ir.ExternalTensor(file, offset, length, kind, shape=shape, name=name, base_dir=store.folder)
            )
        return found

    return initial


def read_late(source: WeightSource, pieces: Pieces) -> Initial:
    """Let initializers be read, one at a time, when the graph is written: for a graph whose weights are on disk."""

    def values(piece: WeightPiece, dtype: torch.dtype) -> Any:
        flat = source.read(piece.name).reshape(-1)
        part = flat[piece.first : piece.first + torch.Size(piece.shape).numel()]
        return TorchTensor(part.reshape(piece.shape).to(dtype))

    def initial(name: str, tensor: torch.Tensor) -> Sequence[ir.TensorProtocol]:
        if name not in pieces:
            return _own(name, tensor)
        kind = onnx_dtype(tensor.dtype)
        return [
            ir.LazyTensor(partial(values, piece, tensor.dtype), dtype=kind, shape=ir.Shape(piece.shape), name=name)
            for piece in pieces[name]
        ]

    return initial


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return what ONNX calls a dtype."""
    return TorchTensor(torch.empty(0, dtype=dtype)).dtype


def weight_files(model: ir.Model) -> list[str]:
    """Return the files that a model's initializers point to, in order of their names."""
    held_outside = (v.const_value for v in model.graph.initializers.values())
    return sorted({str(tensor.location) for tensor in held_outside if isinstance(tensor, ir.ExternalTensor)})


def _own(name: str, tensor: torch.Tensor) -> Sequence[ir.TensorProtocol]:
    if tensor.is_meta:
        raise RuntimeError(f"{name}: on the meta device, and no file is known that holds it")
    return held(name, tensor)
