"""The dtypes of a model: the main one, and those of the tensors that its class or its user keeps in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ppcl_fx.errors import PpclError
from ppcl_fx.io.shards import loaded_dtype
from ppcl_fx.ir.meta import graph_info

DtypeName = Literal["float64", "float32", "float16", "bfloat16"]
NAMES: dict[DtypeName, torch.dtype] = {name: getattr(torch, name) for name in get_args(DtypeName)}
"""The dtypes of weights by name."""


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Return the names of the parts that stay in float32 when diffusers loads a model in another dtype.

    It may be given as its class, or as a traced graph.
    """
    if isinstance(model, torch.fx.GraphModule):
        return tuple(graph_info(model).get("kept", ()))
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model answers: of its first weight that its class does not keep in float32."""
    kept = kept_in_float32(model)
    floating = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    # By a part of the name, as diffusers answers, and not by a whole one, as it loads.
    free = (dtype for name, dtype in floating if not any(part in name for part in kept))
    return next(free, floating[0][1] if floating else torch.float32)


def other_dtypes(model: nn.Module, more: Mapping[str, Tensor]) -> dict[str, DtypeName]:
    """Return the dtypes that loading a model, or its traced graph, in its main dtype would not give it, by tensor.

    These are of the state dict, `more` that a graph does not have included, where they differ from `loaded_dtype`, and
    of all buffers that no file holds.
    """
    main, kept, stored = main_dtype(model), kept_in_float32(model), {**model.state_dict(keep_vars=True), **more}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    found = {
        name: tensor.dtype
        for name, tensor in {**stored, **buffers}.items()
        if tensor.is_floating_point() and (name in buffers or tensor.dtype != loaded_dtype(name, main, kept))
    }
    return {name: dtype_name(dtype) for name, dtype in sorted(found.items())}


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """Return the name of a dtype of weights. Raises `PpclError`: no weights that are read here have it."""
    for name, known in NAMES.items():
        if known == dtype:
            return name
    raise PpclError(f"the model's weights are {dtype}; convert them to one of {', '.join(NAMES)} first")


def set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype], read: Any = None) -> None:
    """Give some parameters and buffers of a model, by name, other dtypes; names that it does not have are passed over.

    `read` gives a tensor of the state dict by name, in the dtype that it is stored in; None casts what is there.
    """
    stored = model.state_dict(keep_vars=True)
    there = {**dict(model.named_buffers()), **stored}
    for name, dtype in dtypes.items():
        if name in there and there[name].dtype != dtype:
            source = read(name) if read is not None and name in stored else there[name].data
            there[name].data = source.to(dtype)
