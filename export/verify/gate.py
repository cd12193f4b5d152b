"""The gate of an export: a file is kept only where it does what PyTorch does, on recorded calls and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.verify.metrics import Agreement, Gate, agreement, spread, worst
from ppcl_fx.export.verify.reference import Answers
from ppcl_fx.export.verify.sampling import SamplingRun, compare_runs

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call, Calls
    from ppcl_fx.export.runtime.engine import EngineTransformer
    from ppcl_fx.model.pluggable import PluggableModel

NO_CALLS = "recorded calls were not compared with PyTorch: none were given, the inputs were random; give --calls"
NONE_WANTED = "recorded calls were not compared with PyTorch: none were asked for (--check-calls 0)"
NO_RUN = "no sampling run was compared with PyTorch; give --pipeline"
KEPT = "nothing of this file was kept"


def gated(
    answers: Answers, calls: Calls | None, final: Path, config: ExportConfig, sampling: SamplingRun | None
) -> Gate:
    """Compare a file, which is to be called `final`, to PyTorch on recorded calls and over a whole sampling run.

    Raises:
        PpclError: the file is further from PyTorch than allowed, scores otherwise, or cannot be run.
    """
    not_checked: list[str] = []
    on_calls = None
    if calls is None or not config.check_calls:
        not_checked.append(NO_CALLS if calls is None else NONE_WANTED)
    else:
        on_calls = _on_calls(answers, chosen(calls, config.check_calls), not_checked)
        if on_calls is not None:
            _check(on_calls, config.tolerance, "--tolerance", f"{final}: ")
    if sampling is None:
        not_checked.append(NO_RUN)
        return Gate(calls=on_calls, not_checked=not_checked)
    try:
        on_run = compare_runs(sampling, answers)
    except PpclError as error:
        raise PpclError(f"{final}: the sampling run could not be compared: {error}") from error
    allowed = config.sampling_tolerance
    _check(on_run, allowed, "--sampling-tolerance", f"{final}: over a whole sampling run ")
    if on_run.score is not None and on_run.score != on_run.score_pytorch:
        raise PpclError(
            f"{final}: pictures drawn with it score {on_run.score:g} and PyTorch's {on_run.score_pytorch:g}, and they "
            f"must score the same; {KEPT}; report the model"
        )
    return Gate(calls=on_calls, sampling=on_run, sampling_tolerance=allowed, not_checked=not_checked)


def chosen(calls: Calls, count: int) -> list[Call]:
    """Return at most `count` recorded calls, from the earliest timestep to the latest; only these are read."""
    return [calls[index] for index in spread([head.timestep for head in calls.heads()], count)]


def _on_calls(answers: Answers, calls: list[Call], not_checked: list[str]) -> Agreement | None:
    """Compare call by call; a call of another kind than the traced one is none of this file, and that is said."""
    found: list[Agreement] = []
    outside: list[str] = []
    for call in calls:
        try:
            given = answers.call(call.kwargs)
            expected = answers.pytorch(given)
        except GuardError as error:
            outside.append(f"call {call.index}: {error}")
            continue
        name = f"recorded call {call.index} (timestep {call.timestep:g})"
        found.append(agreement(answers.exported(given), expected, name))
    if outside:
        not_checked.append(
            f"{len(outside)} of {len(calls)} recorded calls were not compared with PyTorch: they are of another kind "
            f"than the file is for ({outside[0]})"
        )
    return worst(found) if found else None


def _check(found: Agreement, tolerance: float, option: str, what: str) -> None:
    if not found.within(tolerance):
        raise PpclError(
            f"{what}it differs from PyTorch by a relative error of {found.relative:.2g} at {found.worst}, more than "
            f"{tolerance:g} (largest difference {found.max_abs:.2g}, cosine {found.cosine:.6f}); {KEPT}; allow more "
            f"with {option}, or report the model"
        )


def compare_artefacts(
    folder: str | Path,
    model: PluggableModel,
    calls: Calls,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    check_calls: int = 8,
    tolerance: float | None = None,
) -> dict[float, Agreement]:
    """Compare every ratio of an exported folder with PyTorch on recorded calls.

    Args:
        folder: what ``ppcl-fx export`` wrote.
        model: the model it was made from, on any device; its mixture is put back afterwards.
        calls: recorded calls.
        backend: what runs the files, as for `EngineTransformer`: ``tensorrt`` for the engines.
        device: where to run them, as for `EngineTransformer`.
        check_calls: calls to compare, at most, from the earliest timestep to the latest.
        tolerance: relative error that is allowed on a call; None only measures. It has to allow for the rounding of an
            engine of half precision, or the model is given in the engine's type.

    Returns:
        The agreement by ratio, the largest ratio first.

    Raises:
        PpclError: nothing here can run a file, a call does not fit it, there are no calls, or a ratio is further from
            PyTorch than `tolerance`.
    """
    from ppcl_fx.export.runtime.engine import EngineTransformer

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
