"""Compare an exported folder with PyTorch as it is deployed: engines on a GPU, and whatever else runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.agreement import Agreement, agreement, worst
from ppcl_fx.export.gate import chosen
from ppcl_fx.export.onnx_file import floats_as
from ppcl_fx.export.runtime import EngineTransformer
from ppcl_fx.export.runtime.sessions import AUTO

if TYPE_CHECKING:
    from ppcl_fx.calls import Call, Calls
    from ppcl_fx.model import PluggableModel


def compare_artefacts(
    folder: str | Path,
    model: PluggableModel,
    calls: Calls,
    *,
    backend: str = AUTO,
    device: str | torch.device | None = None,
    check_calls: int = 8,
    tolerance: float | None = None,
) -> dict[float, Agreement]:
    """Compare every ratio of an exported folder with PyTorch on recorded calls.

    An engine of half precision differs from a float32 model by its rounding; `tolerance` has to allow for that, or the
    model is given in the engine's type.

    Args:
        folder: what ``ppcl-fx export`` wrote.
        model: the model it was made from, on any device; its mixture is put back afterwards.
        calls: recorded calls.
        backend: what runs the files, as for `EngineTransformer`: ``tensorrt`` for the engines.
        device: where to run them, as for `EngineTransformer`.
        check_calls: calls to compare, at most, from the earliest timestep to the latest.
        tolerance: relative error that is allowed on a call; None only measures.

    Returns:
        The agreement by ratio, the largest ratio first.

    Raises:
        PpclError: nothing here can run a file, a call does not fit it, there are no calls, or a ratio is further from
            PyTorch than `tolerance`.
    """
    picked = chosen(calls, check_calls)
    if not picked:
        raise PpclError("there are no recorded calls to compare; record some")
    engine = EngineTransformer(folder, backend=backend, device=device)
    before, found = model.students, {}
    try:
        for keep in engine.keeps:
            model.plug(students=engine.plug(keep=keep).students)
            found[keep] = worst([_compared(engine, model, call) for call in picked])
            if tolerance is not None and not found[keep].within(tolerance):
                raise PpclError(
                    f"{folder}: the ratio {keep:g} in {engine.backend} differs from PyTorch by a relative error of "
                    f"{found[keep].relative:.2g} at {found[keep].worst}, more than {tolerance:g}; export and build it "
                    "again, or allow more"
                )
    finally:
        model.plug(students=before)
    return found


def _compared(engine: EngineTransformer, model: PluggableModel, call: Call) -> Agreement:
    moved = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in call.kwargs.items()}
    there = floats_as({n: v for n, v in moved.items() if n != "return_dict"}, model.dtype)
    with torch.no_grad():
        expected, result = model(**there, return_dict=False)[0], engine(**there, return_dict=False)[0]
    return agreement(result, expected.to(result.device), f"recorded call {call.index}")
