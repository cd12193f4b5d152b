"""The gate of an export: a file is kept only where it does what PyTorch does, on recorded calls and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.export.agreement import Agreement, Gate, SamplingAgreement, agreement, spread, worst
from ppcl_fx.export.answers import Answers
from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.sampling import SamplingRun, compare_runs

if TYPE_CHECKING:
    from ppcl_fx.calls import Call, Calls

NO_CALLS = "recorded calls were not compared with PyTorch: none were given, the inputs were random; give --calls"
NONE_WANTED = "recorded calls were not compared with PyTorch: none were asked for (--check-calls 0)"
NO_RUN = "no sampling run was compared with PyTorch; give --pipeline"
KEPT = "nothing of this file was kept"


def gated(
    answers: Answers, calls: Calls | None, final: Path, config: ExportConfig, sampling: SamplingRun | None
) -> Gate:
    """Compare a file to PyTorch on recorded calls and over a whole sampling run.

    Args:
        answers: PyTorch and the file.
        calls: recorded calls, where there are any.
        final: what the file is to be called, for messages.
        config: how many calls are compared, and the relative errors that are allowed.
        sampling: the sampling run to compare, if any.

    Returns:
        What was found, and what was not compared.

    Raises:
        PpclError: the file is further from PyTorch than allowed, scores otherwise, or cannot be run.
    """
    found = Gate(sampling_tolerance=config.sampling_tolerance if sampling is not None else None)
    if calls is None or not config.check_calls:
        found.not_checked.append(NO_CALLS if calls is None else NONE_WANTED)
    else:
        found.calls = _on_calls(answers, chosen(calls, config.check_calls), found.not_checked)
        if found.calls is not None and not found.calls.within(config.tolerance):
            raise PpclError(f"{final}: {_distance(found.calls, config.tolerance)}; {KEPT}; {_advice('--tolerance')}")
    if sampling is None:
        found.not_checked.append(NO_RUN)
    else:
        try:
            found.sampling = compare_runs(sampling, answers)
        except PpclError as error:
            raise PpclError(f"{final}: the sampling run could not be compared: {error}") from error
        _check_run(found.sampling, config.sampling_tolerance, final)
    return found


def chosen(calls: Calls, count: int) -> list[Call]:
    """Return recorded calls to compare, from the earliest timestep to the latest; only these are read.

    Args:
        calls: all of them.
        count: how many, at most.
    """
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


def _check_run(found: SamplingAgreement, tolerance: float, final: Path) -> None:
    if not found.within(tolerance):
        raise PpclError(
            f"{final}: over a whole sampling run {_distance(found, tolerance)}; {KEPT}; "
            f"{_advice('--sampling-tolerance')}"
        )
    if found.score is not None and found.score_pytorch is not None and found.score != found.score_pytorch:
        raise PpclError(
            f"{final}: pictures drawn with it score {found.score:g} and PyTorch's {found.score_pytorch:g}, and they "
            f"must score the same; {KEPT}; report the model"
        )


def _distance(found: Agreement, tolerance: float) -> str:
    return (
        f"it differs from PyTorch by a relative error of {found.relative:.2g} at {found.worst}, more than "
        f"{tolerance:g} (largest difference {found.max_abs:.2g}, cosine {found.cosine:.6f})"
    )


def _advice(option: str) -> str:
    return f"allow more with {option}, or report the model"
