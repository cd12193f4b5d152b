"""Fingerprints: short hashes that tell one model, or one tensor, from another."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAMPLES = 64
"""Values that are read from each weight; their positions are spread evenly from the first to the last."""


def fingerprint(model: nn.Module, read: Callable[[str], torch.Tensor] | None = None) -> str:
    """Return the hash (sha256) of a model: its class, its configuration, and its parameters and persistent buffers.

    Of each tensor the name, shape, dtype and `SAMPLES` values count, so that a trained model differs from the one it
    was trained from, while a model of 20 B parameters is read in seconds. Tensors on the meta device have no values; of
    weights that accelerate offloads those count that its hooks hold. Where the model was loaded from does not count.
    `read` gives the tensors by name where the model itself has none; their values count in the model's dtypes.
    """
    said = [type(model).__name__, config_of(model)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=_plain).encode())
    offloaded = {} if read is not None else _offloaded(model)
    for name, tensor in sorted(model.state_dict().items()):
        held = read(name) if read is not None else offloaded[name]() if name in offloaded else tensor
        _add(digest, name, tensor, held)
    return digest.hexdigest()


def _offloaded(model: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what reads the tensors that accelerate took out of a model (`cpu_offload`, `disk_offload`), by name."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            held = getattr(one, "weights_map", None)
            if held is None:
                continue
            for name, tensor in module.named_parameters(recurse=False):
                if tensor.is_meta:
                    found[f"{path}.{name}" if path else name] = functools.partial(held.__getitem__, name)
    return found


def state_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of named tensors: of each the name, shape, dtype and `SAMPLES` values, as in `fingerprint`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _add(digest, name, tensor, tensor)
    return digest.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the sha256 (64 hexadecimal digits) of a tensor's dtype, shape and all its bytes."""
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def config_of(model: object) -> dict[str, Any]:
    """Return what a model or a part of a pipeline was made with; empty where it does not say."""
    config = getattr(model, "config", None)
    # Names with an underscore in front say where a model came from, not what it is.
    return {k: v for k, v in config.items() if not k.startswith("_")} if isinstance(config, Mapping) else {}


def _plain(value: object) -> str:
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    raise TypeError(f"a model's configuration holds {value!r} ({type(value).__name__}), which has no fingerprint")


def _add(digest: Any, name: str, tensor: torch.Tensor, held: torch.Tensor) -> None:
    digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
    if not held.is_meta and held.numel():
        places = torch.arange(SAMPLES, device=held.device) * (held.numel() - 1) // (SAMPLES - 1)
        digest.update(_bytes(held.detach().reshape(-1)[places].to(tensor.dtype)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
