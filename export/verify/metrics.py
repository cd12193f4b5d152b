"""How well an exported file agrees with PyTorch: what is measured, and what a manifest says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Agreement(_Strict):
    """The distance between a file's results and PyTorch's. Every number is the worst over the results compared.

    Attributes:
        compared: results that were compared, at least 1.
        relative: norm of the difference, as a share of the norm of PyTorch's result.
        cosine: of the angle between the two results.
        max_abs: largest absolute difference.
        worst: which result has the largest relative error.
    """

    compared: int
    relative: float
    cosine: float
    max_abs: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """Tell whether the relative error is at most `tolerance`; infinity and NaN never are."""
        return math.isfinite(self.relative) and self.relative <= tolerance


class SamplingAgreement(Agreement):
    """The same for whole sampling runs: a result is what one prompt's run ends with, a latent or a picture.

    Attributes:
        transformer_calls: calls of the transformer in a run, all its steps and branches of guidance.
        seed: of the first prompt's noise.
        score: score of the pictures drawn with the file; None where the pipeline's pictures have no score.
        score_pytorch: score of PyTorch's pictures.
    """

    transformer_calls: int
    seed: int
    score: float | None = None
    score_pytorch: float | None = None


class Gate(_Strict):
    """What a file was compared on before it was kept.

    Attributes:
        calls: agreement on recorded calls; None where none was compared.
        sampling: agreement over whole sampling runs; None where none was compared.
        sampling_tolerance: relative error that was allowed for those.
        not_checked: what was not compared, and why; empty where all was.
    """

    calls: Agreement | None = None
    sampling: SamplingAgreement | None = None
    sampling_tolerance: float | None = None
    not_checked: list[str] = []


def agreement(found: torch.Tensor, expected: torch.Tensor, name: str) -> Agreement:
    """Measure one result.

    Args:
        found: what the exported file gives.
        expected: what PyTorch gives.
        name: what to call the result.

    Returns:
        Its distance; infinite, with a cosine of 0, where shapes differ or a value is not finite.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return Agreement(compared=1, relative=math.inf, cosine=0.0, max_abs=math.inf, worst=name)
    mine, theirs = found.double().flatten(), expected.double().flatten()
    difference = mine - theirs
    size, own = float(theirs.norm()), float(mine.norm())
    error = float(difference.norm())
    if size > 0 and own > 0:
        cosine = max(-1.0, min(1.0, float(mine @ theirs) / (size * own)))
    else:
        cosine = 1.0 if error == 0 else 0.0
    return Agreement(
        compared=1,
        relative=error / size if size > 0 else (0.0 if error == 0 else math.inf),
        cosine=cosine,
        max_abs=float(difference.abs().max()) if difference.numel() else 0.0,
        worst=name,
    )


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity where the shapes differ or a value is not a number."""
    if result.shape != expected.shape:
        return float("inf")
    largest = float((result.double() - expected.double()).abs().max())
    return largest if largest == largest else float("inf")


def worst(found: Sequence[Agreement]) -> Agreement:
    """Return the agreement over several results.

    Args:
        found: at least one.
    """
    if not found:
        raise RuntimeError("nothing was compared, so there is no agreement")
    return Agreement(
        compared=sum(one.compared for one in found),
        relative=max(one.relative for one in found),
        cosine=min(one.cosine for one in found),
        max_abs=max(one.max_abs for one in found),
        worst=max(found, key=lambda one: one.relative).worst,
    )


def spread(timesteps: Sequence[float], count: int) -> list[int]:
    """Choose calls evenly from the largest timestep to the smallest, both ends among them.

    Args:
        timesteps: of all calls, in the order of the recording.
        count: how many calls to choose, at most.

    Returns:
        Their indices, the largest timestep first; the same ones each time.
    """
    order = sorted(range(len(timesteps)), key=lambda index: (-timesteps[index], index))
    if count >= len(order):
        return order
    gaps = max(count - 1, 1)
    return [order[round(place * (len(order) - 1) / gaps)] for place in range(count)]
