"""The weights of a diffusers model folder, one file or several shards: names and shapes first, tensors when asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError
from ppcl_fx.files import inside, read_json, read_safetensors, tensor_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Weights:
    """What the safetensors files of a folder hold.

    Attributes:
        folder: the folder.
        files: the files, each once.
        shapes: name -> shape, of every tensor.
        dtypes: the tensors' safetensors dtypes (``"BF16"``).
    """

    folder: Path
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: frozenset[str]

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Read every tensor, floating-point ones in `dtype` (as stored when None).

        Raises:
            PpclError: a file is truncated.
        """
        found: dict[str, torch.Tensor] = {}
        for file in self.files:
            for name, tensor in read_safetensors(file).items():
                found[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        return found


def open_weights(folder: Path) -> Weights:
    """Read the headers of a folder's weights; no tensor is read.

    Raises:
        PpclError: no weights, a shard is missing or truncated, its index leads out of the folder or disagrees with
            the shards.
    """
    index = inside(folder, INDEX)
    if not index.is_file():
        found = {name: shape for name, (_, shape) in tensor_shapes(inside(folder, WEIGHTS)).items()}
        return Weights(folder, (folder / WEIGHTS,), found, _dtypes(folder / WEIGHTS))
    weight_map = read_json(index, _Index).weight_map
    names = sorted(set(weight_map.values()))
    files = tuple(inside(folder, name) for name in names)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: frozenset[str] = frozenset()
    for name, file in zip(names, files, strict=True):
        held = tensor_shapes(file)
        wanted = {tensor for tensor, place in weight_map.items() if place == name}
        if set(held) != wanted:
            odd = sorted(set(held) ^ wanted)[0]
            raise PpclError(f"{index}: disagrees with {name} about {odd}; copy the folder again")
        shapes |= {tensor: shape for tensor, (_, shape) in held.items()}
        dtypes |= _dtypes(file)
    return Weights(folder, files, shapes, dtypes)


def _dtypes(file: Path) -> frozenset[str]:
    return frozenset(dtype for dtype, _ in tensor_shapes(file).values())
