"""The tensor codec: nested values to bytes and back, tensors with what they share, without pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ppcl_fx.io.files import write_safetensors


@dataclass
class Encoded:
    """Nested values as bytes and a description; tensors that share memory share it again after unpacking."""

    spec: Any
    """The values in terms of JSON; a tensor says which piece of memory it lies in, and how."""
    memory: list[Tensor]
    """The pieces, one-dimensional ``uint8`` tensors on the CPU."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pieces hold on to."""
        storages = [piece.untyped_storage() for piece in self.memory]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def write(self, path: Path) -> None:
        """Write to a safetensors file; raises `PpclError` where that is not possible."""
        pieces = {str(number): piece for number, piece in enumerate(self.memory) if len(piece)}
        sizes = [len(piece) for piece in self.memory]
        write_safetensors(path, pieces, {"spec": json.dumps({"sizes": sizes, "value": self.spec})})

    @classmethod
    def read(cls, path: Path) -> Encoded:
        """Read what `write` wrote."""
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["spec"])
            memory = [
                # A copy: the file may go, and the pieces may be written to.
                file.get_tensor(str(number)).clone() if size else torch.empty(0, dtype=torch.uint8)
                for number, size in enumerate(found["sizes"])
            ]
        return cls(found["value"], memory)


def encode(value: Any) -> Encoded:
    """Take nested values apart. Tensors are copied only where they are on an accelerator. Raises `RuntimeError`: a
    value of a kind that no traced graph hands on.
    """
    found: dict[int, list[Tensor]] = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.setdefault(_storage(leaf), []).append(leaf)
    places: dict[int, tuple[int, int]] = {}
    memory = []
    for number, (storage, tensors) in enumerate(found.items()):
        start = min(_span(tensor)[0] for tensor in tensors)
        stop = max(_span(tensor)[1] for tensor in tensors)
        start -= start % 16  # any dtype can begin here
        places[storage] = (number, start)
        whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(tensors[0].untyped_storage())
        piece = whole[start:stop].cpu()
        # A small part of a large tensor does not keep the large one.
        memory.append(piece.clone() if 2 * len(piece) < piece.untyped_storage().nbytes() else piece)
    return Encoded(_spec(value, places), memory)


def decode(encoded: Encoded, device: torch.device) -> Any:
    """Put the values together again, their tensors on `device`."""
    return _value(encoded.spec, [piece.to(device) for piece in encoded.memory], device)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies in: first, and one after the last."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return first, first
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + int(reach + 1) * tensor.element_size()


def _spec(value: Any, places: dict[int, tuple[int, int]]) -> Any:
    if isinstance(value, Tensor):
        number, start = places[_storage(value)]
        first = value.storage_offset() * value.element_size() - start
        bits = [value.is_conj(), value.is_neg()]
        return {"tensor": [number, first, str(value.dtype), list(value.shape), list(value.stride()), *bits]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Size):
        return {"size": [int(item) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_spec(part, places) for part in (value.start, value.stop, value.step)]}
    if type(value) is list or type(value) is tuple:
        return {type(value).__name__: [_spec(item, places) for item in value]}
    if type(value) is dict:
        return {"dict": [[_spec(key, places), _spec(item, places)] for key, item in value.items()]}
    raise RuntimeError(f"a {type(value).__name__} crosses two blocks, and tensor_codec.py has no form for it")


def _value(spec: Any, memory: list[Tensor], device: torch.device) -> Any:
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    match kind:
        case "tensor":
            return _tensor(content, memory)
        case "dtype":
            return _dtype(content)
        case "device":
            return device
        case "dict":
            return {_value(key, memory, device): _value(item, memory, device) for key, item in content}
    items = [_value(item, memory, device) for item in content]
    return slice(*items) if kind == "slice" else {"size": torch.Size, "tuple": tuple, "list": list}[kind](items)


def _tensor(content: list[Any], memory: list[Tensor]) -> Tensor:
    number, first, name, shape, stride, conj, neg = content
    dtype = _dtype(name)
    piece = memory[number]
    if piece.numel() == 0:
        return torch.empty(shape, dtype=dtype, device=piece.device)
    tensor = torch.empty(0, dtype=dtype, device=piece.device)
    tensor.set_(piece.untyped_storage(), (piece.storage_offset() + first) // dtype.itemsize, shape, stride)
    tensor = torch._conj(tensor) if conj else tensor
    return torch._neg_view(tensor) if neg else tensor


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise RuntimeError(f"no dtype {name!r}")
    return found
