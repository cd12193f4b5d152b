"""Write and read checkpoints so that a crash at any moment leaves a whole one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ppcl_fx.errors import PpclError


def save_state(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, float]) -> None:
    """Write tensors and a few numbers to one safetensors file, beside it first, then in one move."""
    beside = path.with_suffix(".tmp")
    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, beside, metadata={name: repr(value) for name, value in facts.items()})
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Read what ``save_state`` wrote.

    Raises:
        PpclError: there is no such file.
    """
    if not path.is_file():
        raise PpclError(f"no checkpoint at {path}; leave out --resume to start anew")
    with safe_open(path, framework="pt") as file:
        facts = {name: float(value) for name, value in (file.metadata() or {}).items()}
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, facts
