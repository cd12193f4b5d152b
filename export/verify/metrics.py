"""How well an exported file agrees with PyTorch: what is measured, and what a manifest says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field

from ppcl_fx.io.files import Record


class Agreement(Record):
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


class Gate(Record):
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
    not_checked: list[str] = Field(default_factory=list)


def agreement(found: torch.Tensor, expected: torch.Tensor, name: str) -> Agreement:
    """Measure how far one result is from PyTorch's: infinitely, with a cosine of 0, where shapes differ or a value is
    not finite.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return Agreement(compared=1, relative=math.inf, cosine=0.0, max_abs=math.inf, worst=name)
    mine, theirs = found.double().flatten(), expected.double().flatten()
    away = mine - theirs
    size, own, error = float(theirs.norm()), float(mine.norm()), float(away.norm())
    # Of a result without length: 1 and no error where both are.
    cosine, relative = (1.0, 0.0) if error == 0 else (0.0, math.inf)
    if size > 0:
        relative = error / size
        cosine = max(-1.0, min(1.0, float(mine @ theirs) / (size * own))) if own > 0 else 0.0
    largest = float(away.abs().max()) if away.numel() else 0.0
    return Agreement(compared=1, relative=relative, cosine=cosine, max_abs=largest, worst=name)


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity where the shapes differ or a value is not finite."""
    return agreement(result, expected, "").max_abs


def worst(found: Sequence[Agreement]) -> Agreement:
    """Return the agreement over several results, at least one."""
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
    """Choose at most `count` calls evenly from the largest timestep to the smallest, both ends among them.

    Returns:
        Their indices, the largest timestep first; the same ones each time.
    """
    order = sorted(range(len(timesteps)), key=lambda index: (-timesteps[index], index))
    if count >= len(order):
        return order
    gaps = max(count - 1, 1)
    return [order[round(place * (len(order) - 1) / gaps)] for place in range(count)]
