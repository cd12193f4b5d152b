"""Small pluggable models with edits of every kind, and calls to train them on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from tests import models

CALLS = 5

_DUAL = "transformer_blocks"
_SINGLE = "single_transformer_blocks"
_CASES: dict[str, tuple[Any, Any, list[Edit]]] = {
    "qwen": (
        models.tiny_qwen,
        models.qwen_kwargs,
        [
            DepthEdit(stack=_DUAL, first=0, last=1),
            DepthEdit(stack=_DUAL, first=2, last=3, init="middle"),
            FfnEdit(stack=_DUAL, block=4),
            TextStreamEdit(stack=_DUAL, source=4, last=5),
        ],
    ),
    "flux": (
        models.tiny_flux,
        models.flux_kwargs,
        [
            DepthEdit(stack=_DUAL, first=1, last=2),
            DepthEdit(stack=_SINGLE, first=1, last=3),
            FfnEdit(stack=_DUAL, block=3),
        ],
    ),
    "sd3": (
        models.tiny_sd3,
        models.sd3_kwargs,
        [
            DepthEdit(stack=_DUAL, first=0, last=1),
            DepthEdit(stack=_DUAL, first=3, last=4),
            FfnEdit(stack=_DUAL, block=2),
            TextStreamEdit(stack=_DUAL, source=5, last=6),
        ],
    ),
}


def build(kind: str = "qwen", dtype: torch.dtype = torch.float32) -> tuple[Any, Calls]:
    """Return a pluggable model ("qwen", "flux" or "sd3") with nothing trained, and `CALLS` calls of its teacher."""
    model, calls = _built(kind, dtype)
    return copy.deepcopy(model), calls


@functools.cache
def _built(kind: str, dtype: torch.dtype) -> tuple[Any, Calls]:
    make, kwargs, edits = _CASES[kind]
    teacher, example = make()
    teacher.to(dtype)
    mark = fingerprint(teacher)
    model = ppcl_fx.rewrite(ppcl_fx.trace(teacher, _cast(example, dtype)), Plan(model=mark, edits=edits))
    recorded = [_cast(kwargs(seed=seed), dtype) for seed in range(CALLS)]
    calls = [
        Call(k, ("a square",), float(k["timestep"][0]), i, len(k["timestep"])) for i, k in enumerate(recorded)
    ]
    return model, Calls(calls, mark)


def _cast(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
