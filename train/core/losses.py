"""The distillation losses: Eq. 6 and 7 for depth, Eq. 10 to 12 for width.

The squared error is *summed over the features* of a token and *averaged over batch and tokens*, everywhere. So the
normalised terms lie in [0, 4] whatever the model's width, and none depends on the batch or the text length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ppcl_fx.train.config import Weights

LossTerm = tuple[str, Tensor, Tensor]
"""A term's name, the student's value and the teacher's value, both ``[batch, tokens, channels]``."""


def _weight(term: str, weights: Weights) -> float:
    """Return the weight of a term by the first part of its name; ``z`` is one of the linear ones."""
    kind = "linear" if term == "z" else term.partition(".")[0]
    if kind not in ("image", "text", "linear", "attention"):
        raise RuntimeError(f"unknown loss term {term!r}")
    return float(getattr(weights, kind))


def normalized_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||Norm(student) - Norm(teacher)||^2`` (Eq. 6, Eq. 11), a float32 scalar in [0, 4].

    Norm divides each token by its L2 length over the features (the last dimension), so directions count,
    lengths do not.
    """
    return squared_error(functional.normalize(student.float(), dim=-1), functional.normalize(teacher.float(), dim=-1))


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||student - teacher||^2`` (Eq. 12), float32: summed over features, averaged over batch and tokens."""
    if student.shape != teacher.shape:
        raise RuntimeError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    return (student.float() - teacher.float()).square().sum(-1).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||student - teacher||^2 / ||teacher||^2`` over all tokens, a float32 scalar: 0 for equal
    states, 1 for a student of zeros.
    """
    return squared_error(student, teacher) / teacher.detach().float().square().sum(-1).mean()


def edit_loss(pairs: Iterable[LossTerm], weights: Weights) -> Tensor:
    """Return one edit's loss: the weighted sum of its terms, a float32 scalar.

    For a depth edit these are the streams' normalised errors (Eq. 6); for a width edit the normalised errors (Eq. 11)
    and the linear ones (Eq. 12), whose sum is the summand of Eq. 10. Terms of weight 0 are not computed. Raises
    RuntimeError where no term has a weight, or a term is unknown.
    """
    terms = [term for name, student, teacher in pairs for term in _terms(name, student, teacher, weights)]
    if not terms:
        raise RuntimeError("an edit has no loss term of a weight other than 0")
    return total_loss(terms)


def _terms(name: str, student: Tensor, teacher: Tensor, weights: Weights) -> Iterator[Tensor]:
    weight = _weight(name, weights)
    if weight != 0.0:
        # Eq. 12 compares values as they are, not normalised.
        error = squared_error if name == "z" or name.startswith("linear.") else normalized_error
        yield weight * error(student, teacher)
    if weights.relative != 0.0 and name in ("image", "text"):
        yield weights.relative * relative_error(student, teacher)


def total_loss(losses: Iterable[Tensor]) -> Tensor:
    """Return the sum over edits (Eq. 7, Eq. 10), a scalar."""
    return torch.stack(list(losses)).sum()


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the student's velocity against the teacher's (fine-tuning), a float32 scalar."""
    if student.shape != teacher.shape:
        raise RuntimeError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    return functional.mse_loss(student.float(), teacher.float())
